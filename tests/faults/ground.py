"""What scenarios stand on: campaigns to break, what they run on, and the one that nothing disturbs."""

from __future__ import annotations

import os
import random
import tempfile
import uuid
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.ledger.ledger import Ledger
from tests.campaigns import digests, records, scored_items, write_campaign
from tests.faults.run import Expected, Run
from tests.ray_cluster import ENVIRONMENT, RayCluster
from tests.servers import S3Server, seaweedfs_server
from workers.storage import open_store

NODES = 2


class Ground:
    """Everything is started when it is first asked for, and goes at the end. A context manager.

    `expected` may come from an undisturbed run of `tests.campaigns.write_campaign` that was made elsewhere.
    """

    def __init__(self, expected: Expected | None = None) -> None:
        self._expected = expected
        self._ends = ExitStack()
        self._cluster: RayCluster | None = None

    def __enter__(self) -> Ground:
        self.folder = Path(self._ends.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave_cluster()
        self._ends.close()

    @property
    def cluster(self) -> RayCluster:
        """A head and nodes with a CPU each, on this machine."""
        if self._cluster is None:
            self._cluster = RayCluster(NODES)
        return self._cluster

    def leave_cluster(self) -> None:
        """Make room for another one."""
        if self._cluster is not None:
            self._cluster.__exit__(None, None, None)
            self._cluster = None

    @cached_property
    def s3(self) -> S3Server:
        """A server with a bucket named `faults`; this process's own environment leads to it."""
        server = self._ends.enter_context(seaweedfs_server())
        before = dict(os.environ)
        self._ends.callback(os.environ.update, before)
        self._ends.callback(os.environ.clear)  # comes first
        os.environ.update(server.environment)
        import boto3

        boto3.session.Session().client("s3").create_bucket(Bucket="faults")
        return server

    @cached_property
    def expected(self) -> Expected:
        if self._expected is None:
            run = self.run(random.Random(0))
            run.finish()
            self._expected = run_to_expect(run.location)
        return self._expected

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run(self, dice: random.Random, *, alone: bool = False, **changes: Any) -> Run:
        """A new campaign, on the cluster or on a Ray of its own; `changes` replace keys of its file."""
        folder = self.new_folder()
        place = {} if alone else {"address": self.cluster.address}
        file = write_campaign(folder, **(place | changes))
        store = changes.get("store", str(folder / "store"))
        environment = {} if alone else ENVIRONMENT
        return Run(file, f"{store}/small", environment, nullcontext, self, dice)

    def bucket(self) -> str:
        """A place of its own on the S3 server."""
        assert self.s3
        return f"s3://faults/{uuid.uuid4().hex}"


def run_to_expect(location: str) -> Expected:
    """What a finished campaign came to."""
    store = open_store(location)
    result = Ledger(store).result()
    assert result is not None
    ledger = records(store)
    return Expected(digests(result["child"]), sorted(scored_items(ledger)), len(ledger))
