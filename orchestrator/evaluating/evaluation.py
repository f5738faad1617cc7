"""An evaluation: what decides its results, and what of it is recorded in a store.

It lies in `STORE/eval/NAME`. The name has a hash of all that decides the results, so the same command
finds it again. Results are recorded block by block in a ledger under `records`; `result.json` and
`items.parquet` are written from it at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.ledger.ledger import Ledger, Record
from orchestrator.ledger.record_shapes import evaluation_records
from workers.checkpoints import Checkpoint
from workers.errors import BadInputError
from workers.evaluation.protocols import Majority, Protocol, protocol_to_dict
from workers.evaluation.task import BLOCK_BATCHES, Task
from workers.storage import Store, open_store
from workers.storage.hub import HUB_SCHEME
from workers.storage.locations import find_location

FOLDER = "eval"
RECORDS = "records"
ADDRESS = "base_url"
"""Of a served checkpoint: a place, which may change."""

BLOCKS = 16
"""So many blocks are wanted, which is as many workers as can share them."""

NAME_CHARACTERS = 40
HASH_CHARACTERS = 12


@dataclass(frozen=True)
class Wish:
    """What is asked of checkpoints."""

    tasks: tuple[Task, ...]
    split: str
    protocol: Protocol
    engine: dict[str, Any]
    """See `workers.evaluation.engines.build_engine`."""
    batch_size: int

    @property
    def block_items(self) -> int:
        """Items that an engine is asked about in one call: so many that there are about `BLOCKS` blocks, but
        that each has texts for a whole batch.

        It follows from what is in the identity. The number of workers, which may be another one when an
        evaluation goes on, has no say.
        """
        items = sum(len(task.items[self.split]) for task in self.tasks)
        whole_batch = max(
            math.ceil(self.batch_size / _texts_of_item(task, self.protocol, self.split))
            for task in self.tasks
        )
        wanted = min(math.ceil(items / BLOCKS), BLOCK_BATCHES * self.batch_size)
        return max(whole_batch, wanted)


def _texts_of_item(task: Task, protocol: Protocol, split: str) -> int:
    """How many texts an item is, at least, when it is asked about first."""
    if isinstance(protocol, Majority):
        return protocol.samples
    if task.kind == "multiple_choice":
        return min(len(item.choices) for item in task.items[split])
    return 1


@dataclass(frozen=True)
class Evaluation:
    """A wish of one checkpoint."""

    checkpoint: Checkpoint
    wish: Wish

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the results, as plain data: contents, not places."""
        wish = self.wish
        return {
            "checkpoint": self.checkpoint.fingerprint,
            "tasks": {task.name: task.fingerprint for task in wish.tasks},
            "split": wish.split,
            "protocol": protocol_to_dict(wish.protocol),
            "engine": {key: value for key, value in wish.engine.items() if key != ADDRESS},
            "batch_size": wish.batch_size,
        }

    @property
    def name(self) -> str:
        """A name for people, and a hash of the identity."""
        place = re.sub(r"@[0-9a-f]{40}", "", self.checkpoint.location).rstrip("/")
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", place.rpartition("/")[2]).strip("-.")
        content = json.dumps(self.identity, sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()[:HASH_CHARACTERS]
        return f"{readable[-NAME_CHARACTERS:].lstrip('-.') or 'checkpoint'}-{digest}"

    def store(self, out: Store) -> Store:
        """Where it lies in the store `out`."""
        return out.substore(f"{FOLDER}/{self.name}")


@dataclass
class Recorded:
    """What is recorded of an evaluation."""

    place: str
    identity: dict[str, Any] = field(default_factory=dict)
    location: str = ""
    """Of the checkpoint, where it was evaluated."""
    description: dict[str, Any] | None = None
    """What its engine was."""
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Task -> item id -> result."""
    dev_results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """The same of search items that thresholds were fixed on."""
    thresholds: dict[str, dict[str, Any]] | None = None
    """Task -> what was fixed on its dev items, see `threshold.fix_threshold`."""
    complete: bool = False

    def apply(self, record: Record) -> None:
        """Take in one record."""
        match record["kind"]:
            case "evaluation":
                self.identity, self.location = record["identity"], record["location"]
            case "engine":
                self.description = record["description"]
            case "scored":
                of_stage = self.dev_results if record["stage"] == "dev" else self.results
                for task, items in record["items"].items():
                    of_stage.setdefault(task, {}).update((item["id"], item) for item in items)
            case "thresholds":
                self.thresholds = record["thresholds"]
            case "evaluated":
                self.complete = True


def read_recorded(store: Store, records: Iterable[Record]) -> Recorded:
    """What the records of the evaluation in `store` say."""
    recorded = Recorded(store.uri)
    for record in records:
        recorded.apply(record)
    return recorded


def find_stored(place: str) -> Recorded | None:
    """The finished evaluation at `STORE/eval/NAME`; None if that is something else.

    Raises `BadInputError` for one that is not finished.
    """
    if "+" in place or find_location(place).startswith(HUB_SCHEME):
        return None
    store = open_store(place)
    records = store.substore(RECORDS)
    if next(records.list_objects("ledger/"), None) is None:
        return None
    recorded = read_recorded(store, Ledger(records, check=evaluation_records()).records)
    if not recorded.complete:
        raise BadInputError(
            f"{place}: this evaluation is not finished: run the command that began it again"
        )
    return recorded
