"""`darwin merge` from and to an S3 server that fails: the same child, or a clear error and no child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from orchestrator.child_writer import MANIFEST, PROGRESS
from tests.campaigns import digests, run_darwin
from tests.checkpoint_files import write_checkpoint
from tests.fault_proxy import Exchange, FaultProxy, answer, delay
from tests.faults.stores import FAULTS, SHARE
from tests.servers import S3Server
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.storage import open_store

PARTS = 3
HURRIED = """
import sys
from workers.storage.retry import RetryPolicy
RetryPolicy.__init__.__defaults__ = (4, 0.02, 0.1, 20.0)
from orchestrator.cli import main
sys.exit(main())
"""
"""The command with less patience than it ships with: no test should wait for minutes."""
HURRIED_SECONDS = 60.0
"""Far more than so few tries take, also on a busy machine; the usual policy alone would take 27 s
for each request that fails for good."""


@pytest.fixture(scope="module")
def places(s3_location: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two parents in the bucket: a file of two parts, and one of a single small one."""
    found = {}
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        large = torch.randn(4, 6000, 1000, generator=generator).bfloat16()
        small = torch.randn(300, 300, generator=generator).bfloat16()
        folder = write_checkpoint(
            tmp_path_factory.mktemp("parents") / name,
            {f"model.layers.{n}.mlp.gate_proj.weight": w.clone() for n, w in enumerate(large)},
            {"model.layers.1.mlp.up_proj.weight": small, "model.norm.weight": small[0].clone()},
            files={"tokenizer.json": b"{}"},
        )
        store = open_store(f"{s3_location}/faults/{name}")
        for file in folder.iterdir():
            store.write(file.name, file.read_bytes())
        found[name] = store.uri
    return found


@pytest.fixture(scope="module")
def recipe(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    parents = [{"name": name, "path": place} for name, place in places.items()]
    rules = [{"method": "linear", "parameters": {"weight": {"a": 0.3, "b": 0.7}}}]
    file.write_text(yaml.safe_dump({"parents": parents, "rules": rules}))
    return str(file)


@pytest.fixture(scope="module")
def undisturbed(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the child's files are when nothing fails."""
    target = str(tmp_path_factory.mktemp("undisturbed") / "child")
    run_darwin("merge", recipe, target)
    return digests(target)


def through(proxy: FaultProxy) -> dict[str, str]:
    return dict(os.environ) | {"AWS_ENDPOINT_URL": proxy.endpoint}


def test_a_fifth_of_all_requests_fails(
    recipe: str, undisturbed: dict[str, str], s3_server: S3Server, s3_location: str
) -> None:
    target = f"{s3_location}/faults/child"
    with FaultProxy(s3_server.endpoint) as proxy:
        proxy.trouble(SHARE, *FAULTS)
        run_darwin("merge", recipe, target, environment=through(proxy))
    assert proxy.troubled > 2 * len(FAULTS)
    assert digests(target) == undisturbed
    assert run_darwin("verify", target)["status"] == "sound"


@pytest.mark.parametrize("first", ["any request", "a record", "the last file"])
def test_a_server_that_fails_for_good(
    first: str, recipe: str, undisturbed: dict[str, str], s3_server: S3Server, s3_location: str
) -> None:
    """From the first request on, in the middle of the weights, or when only config.json is missing."""
    target = f"{s3_location}/faults/{first.replace(' ', '-')}"
    store = open_store(target)
    with FaultProxy(s3_server.endpoint) as proxy:

        def fail_for_good(exchange: Exchange) -> None:
            proxy.trouble(1.0, answer(503, "SlowDown"))
            answer(503, "SlowDown")(exchange)

        key = target.removeprefix("s3:/")
        if first == "any request":
            proxy.inject(fail_for_good)
        elif first == "a record":
            records = f"PUT {key}/{PROGRESS}/"
            proxy.inject(delay(0), times=2, only=records)  # the manifest, and the first part
            proxy.inject(fail_for_good, only=records)
        else:
            proxy.inject(fail_for_good, only=f"PUT {key}/config.json")
        start = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-c", HURRIED, "merge", recipe, target, "--json"],
            env=through(proxy),
            capture_output=True,
            text=True,
            timeout=300,
        )
        took = time.monotonic() - start
        assert proxy.faults_left == 0, f"the request to fail at is not in {proxy.requests}"
    assert ended.returncode == 1, ended.stderr
    assert took < HURRIED_SECONDS
    error = json.loads(ended.stdout)["error"]
    assert "failed 4 times" in error and "SlowDown" in error and "s3://" in error
    assert "Traceback" not in ended.stderr
    with pytest.raises(BadInputError):
        open_checkpoint(target)
    present = {info.key for info in store.list_objects()}
    assert "config.json" not in present
    if first != "the last file":
        assert not present & set(undisturbed)
    assert (MANIFEST in present) == (first != "any request")
    with FaultProxy(s3_server.endpoint) as proxy:
        run_darwin("merge", recipe, target, environment=through(proxy))
    assert digests(target) == undisturbed
    written = [request for request in proxy.requests if "partNumber=" in request]
    if first == "any request":
        assert len(written) == PARTS
    else:
        assert len(written) < PARTS, "what was recorded as written was written again"
