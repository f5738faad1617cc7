"""What a campaign, an evaluation and a merge have left in a store, damaged: it is read, or refused by name.

The records are those of a real raced campaign. Damage is of three kinds: other bytes, another value or no
value somewhere inside, and records in another order. None may end in another exception than
`BadInputError`, which names the place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import orchestrator.ledger.lease as lease_module
from orchestrator.evaluating.comparing import compare_evaluations
from orchestrator.evaluating.evaluation import RECORDS, find_stored
from orchestrator.ledger.lease import acquire_lease
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.state import read_campaign
from orchestrator.merge_progress import MANIFEST, PROGRESS, read_manifest, read_progress
from orchestrator.mri.scan import find_scan, scan_key, scan_parents
from orchestrator.overview import campaign_overview, render_overview
from orchestrator.places import resolve
from orchestrator.reporting.report import build_report
from tests.scripted_campaign import scripted
from workers.errors import BadInputError
from workers.storage import Store, open_store
from workers.storage.folder import FolderStore

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**400, 0.5, "", "x", "../../outside", "/outside", "\ud800", [], {}, [[]],
    {"": None}, float("nan"), float("inf"), ["x"], {"x": "x"}, {"x": 1.0},
)  # fmt: skip
DEEP = b"[" * 100_000


def cases(number: int) -> settings:
    """Always the same ones."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Damage:
    """Damage to a JSON document, drawn at random."""

    def __init__(self, dice: Any) -> None:
        self.dice = dice

    def __call__(self, data: bytes) -> bytes:
        kind = self.dice.randrange(4)
        if kind == 0:
            return self._bytes(data)
        return self._value(json.loads(data))

    def _bytes(self, data: bytes) -> bytes:
        place = self.dice.randrange(len(data))
        change = self.dice.randrange(4)
        if change == 0:
            return data[:place]
        if change == 1:
            return data[:place] + data[place + 1 :]
        if change == 2:
            return DEEP
        return data[:place] + self.dice.randbytes(1) + data[place + 1 :]

    def _value(self, document: Any) -> bytes:
        """Another value, or none, at some place inside; near the top more often than at the bottom."""
        document = copy.deepcopy(document)
        holder = document
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = self.dice.choice(keys)
            inner = holder[key]
            if not isinstance(inner, dict | list) or not inner or self.dice.random() < 0.3:
                break
            holder = inner
        if self.dice.random() < 0.2:
            del holder[key]
        else:
            holder[key] = self.dice.choice(ODD)
        return json.dumps(document).encode()


DAMAGES = st.randoms(use_true_random=False).map(Damage)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished campaign, with races."""
    made = scripted(
        tmp_path_factory.mktemp("fuzzed"),
        lambda recipe, item: int(recipe.id[:4], 16) % 5 < len(item.prompt) % 5,
        tasks=[{"name": "reverse", "search_items": 10, "holdout_items": 4}],
        search={"optimizer": "cma_es", "evaluations": 6, "population": 3},
        racing={"use": "race"},
        genome={"space": "components", "method": "linear"},
    )
    assert made.run()["status"] == "done"
    return Path(made.store.uri)


class InMemory(FolderStore):
    """Objects that are in memory only."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__("/memory/of/the/test")
        self.files = files

    def read_with_version(self, key: str) -> tuple[bytes, str]:
        return self.files[key], "1"

    def _walk(self, prefix: str) -> Any:
        return (key for key in sorted(self.files) if key.startswith(prefix))

    def info(self, key: str) -> Any:
        from workers.storage import ObjectInfo

        return ObjectInfo(key, len(self.files[key]), "1")


def ledger_of(folder: Path) -> dict[str, bytes]:
    return {f"ledger/{file.name}": file.read_bytes() for file in (folder / "ledger").iterdir()}


def refused_by_name(store: Store, read: Callable[[], Any], name: str) -> bool:
    refusal = None
    try:
        read()
    except BadInputError as error:
        refusal = str(error)
    if refusal is None:
        return False
    assert store.uri in refusal
    assert name in refusal
    assert len(refusal) < 1000, "a message that nobody can read"
    return True


def test_records_are_read_or_refused_by_name(campaign: Path) -> None:
    whole = ledger_of(campaign)
    kinds = {json.loads(data)["kind"] for data in whole.values()}
    assert kinds >= {"campaign", "asked", "scored", "race", "block", "raced", "finished"}
    refused: list[bool] = []

    @given(st.sampled_from(sorted(whole)), DAMAGES)
    @cases(250)
    def run(key: str, damage: Damage) -> None:
        store = InMemory(whole | {key: damage(whole[key])})

        def read() -> None:
            ledger, state = read_campaign(store)
            found = [state.best(100), state.evaluated(100), state.races.to_dict(), ledger.result()]
            json.dumps(
                [str(found), [state.fitness(r) for r, _ in state.evaluations]], allow_nan=False
            )

        refused.append(refused_by_name(store, read, "ledger"))

    run()
    assert 0.3 < sum(refused) / len(refused) < 0.95, "neither all, nor none"


def test_records_in_another_order_are_refused(campaign: Path) -> None:
    whole = ledger_of(campaign)
    keys = sorted(whole)
    kinds = {key: json.loads(whole[key])["kind"] for key in keys}

    def first(kind: str) -> str:
        return next(key for key in keys if kinds[key] == kind)

    assert read_campaign(InMemory(whole))[0].records
    swapped = [
        ("asked", "race"), ("race", "block"), ("epoch", "campaign"), ("block", "asked"),
    ]  # fmt: skip
    for one, other in swapped:
        a, b = first(one), first(other)
        store = InMemory(whole | {a: whole[b], b: whole[a]})
        assert refused_by_name(store, lambda s=store: read_campaign(s), "ledger/0")
    asked = first("asked")
    store = InMemory(whole | {keys[keys.index(asked) + 1]: whole[asked]})
    assert refused_by_name(store, lambda: read_campaign(store), "ledger/0")
    gap = InMemory({key: data for key, data in whole.items() if key != asked})
    assert refused_by_name(gap, lambda: read_campaign(gap), "gap")


@pytest.fixture
def changed(campaign: Path) -> Any:
    """Change a file of the campaign for the time of a test."""
    kept: dict[Path, bytes] = {}

    def change(name: str, data: bytes) -> None:
        path = campaign / name
        kept.setdefault(path, path.read_bytes())
        path.write_bytes(data)

    yield change
    for path, data in kept.items():
        path.write_bytes(data)


def test_status_and_places_take_no_damage_for_data(campaign: Path, changed: Any) -> None:
    whole = ledger_of(campaign)
    store = open_store(str(campaign))
    sure = resolve(str(campaign))

    @given(st.sampled_from(sorted(whole)), DAMAGES)
    @cases(60)
    def run(key: str, damage: Damage) -> None:
        changed(key, damage(whole[key]))

        def read() -> None:
            overview = campaign_overview(str(campaign))
            json.dumps(overview, allow_nan=False)
            Console(file=StringIO(), width=100).print(render_overview(overview))
            place = resolve(str(campaign))
            assert place == sure or place.startswith(f"{campaign}/")

        refused_by_name(store, read, "ledger")
        changed(key, whole[key])

    run()


@pytest.mark.parametrize(
    ("kind", "key"), [("child", "folder"), ("finished", "child"), ("finished", "report")]
)
def test_a_record_does_not_lead_out_of_the_campaign(
    campaign: Path, changed: Any, kind: str, key: str
) -> None:
    name, data = next(
        (name, json.loads(data))
        for name, data in ledger_of(campaign).items()
        if json.loads(data)["kind"] == kind
    )
    store = open_store(str(campaign))
    for place in ("../../elsewhere", "/elsewhere", "a/../../b", "", "..", "a\\b", "a\0b", ["a"]):
        changed(name, json.dumps(data | {key: place}).encode())
        for read in (campaign_overview, resolve, lambda place: build_report(open_store(place))):
            assert refused_by_name(store, lambda read=read: read(str(campaign)), name)


def test_a_report_of_damaged_files_is_refused(campaign: Path, changed: Any) -> None:
    store = open_store(str(campaign))
    child = next(campaign.glob("child-*")).name
    lineage = json.loads((campaign / child / "lineage.json").read_text())
    damaged = [
        b"{", b"[]", DEEP, json.dumps(lineage | {"tensors": 5}).encode(),
        json.dumps({key: value for key, value in lineage.items() if key != "holdout"}).encode(),
    ]  # fmt: skip
    for data in damaged:
        changed(f"{child}/lineage.json", data)
        assert refused_by_name(store, lambda: build_report(store), f"{child}/lineage.json")


def test_a_lease_is_read_or_refused_by_name(
    campaign: Path, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LIFETIME_SECONDS", 0.0)
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 60.0)
    store = open_store(str(campaign))
    owner = {"machine": "m", "started": "1", "token": "t"}
    whole = {"owner": owner, "host": "h", "pid": 4_000_000, "beat": 7, "epoch": 3}
    changed("lease.json", b"{}")

    @given(DAMAGES)
    @cases(150)
    def run(damage: Damage) -> None:
        changed("lease.json", damage(json.dumps(whole).encode()))

        def read() -> None:
            lease = acquire_lease(store, lambda why: None, 1)
            lease.release()
            assert lease.epoch >= 2

        refused_by_name(store, read, "lease.json")

    run()


def test_a_scan_that_was_changed_is_made_again(tmp_path: Path) -> None:
    from orchestrator.places import open_parent
    from orchestrator.pool.calls import open_calls

    parents = {name: open_parent(f"shipped:strings/{name}") for name in ("reverse", "sort")}
    store = open_store(str(tmp_path))
    with open_calls(parents, None, None, None) as calls:
        scan = scan_parents(parents, None, calls, store)
    key = scan_key(parents, None)
    whole = store.read(key)
    assert find_scan(parents, None, store) == scan

    @given(DAMAGES)
    @cases(60)
    def run(damage: Damage) -> None:
        store.write(key, damage(whole))
        assert find_scan(parents, None, store) in (None, scan)

    run()


def test_records_of_a_merge_are_read_or_refused_by_name(tmp_path: Path) -> None:
    part = {
        "file": "model.safetensors", "number": 1, "upload": "u", "receipt": "r", "checksum": 2**64 - 1,
        "changed": {"t": {"a": 1}}, "not_finite": {}, "not_finite_in_father": {},
        "moved": {"t": {"a": [1, 2]}},
    }  # fmt: skip
    files = {
        MANIFEST: {"recipe": "r", "cut": "c", "uploads": {"model.safetensors": "u"}},
        f"{PROGRESS}/1.json": {"parts": [part]},
        f"{PROGRESS}/2.json": {"files": {"model.safetensors": "0" * 64}},
    }
    whole = {key: json.dumps(value).encode() for key, value in files.items()}
    parts = {("model.safetensors", 1)}
    assert read_progress(InMemory(whole), parts) == (
        files[f"{PROGRESS}/2.json"]["files"], [part],
    )  # fmt: skip

    @given(st.sampled_from(sorted(whole)), DAMAGES)
    @cases(300)
    def run(key: str, damage: Damage) -> None:
        store = InMemory(whole | {key: damage(whole[key])})

        def read() -> None:
            read_manifest(store)
            known, reports = read_progress(store, parts)
            assert known.keys() <= {"model.safetensors"}
            assert {(report["file"], report["number"]) for report in reports} <= parts

        refused_by_name(store, read, key)

    run()
    other = {("other.safetensors", 1)}
    assert refused_by_name(store := InMemory(whole), lambda: read_progress(store, other), PROGRESS)


def test_an_evaluation_is_read_or_refused_by_name(tmp_path: Path) -> None:
    place = tmp_path / "eval" / "one"
    ledger = Ledger(open_store(str(place)).substore(RECORDS))
    ledger.open_epoch(1)
    identity = {
        "checkpoint": "f", "tasks": {"t": "g"}, "split": "holdout", "protocol": {"name": "greedy"},
        "engine": {}, "batch_size": 1,
    }  # fmt: skip
    ledger.append("evaluation", identity=identity, location="here")
    ledger.append("engine", description={"engine": "transformers"})
    items = [
        {"id": f"{n}", "score": float(n % 2), "truncated": False, "unparsed": False, "output": ""}
        for n in range(6)
    ]
    ledger.append("scored", stage="judged", items={"t": items})
    ledger.append("evaluated")
    sure = find_stored(str(place))
    assert sure is not None
    folder = place / RECORDS / "ledger"
    whole = {file: file.read_bytes() for file in folder.iterdir()}

    @given(st.sampled_from(sorted(whole)), DAMAGES)
    @cases(200)
    def run(file: Path, damage: Damage) -> None:
        file.write_bytes(damage(whole[file]))

        def read() -> None:
            found = find_stored(str(place))
            if found is not None:
                compare_evaluations(sure, found)

        refused_by_name(open_store(str(place)), read, "")
        file.write_bytes(whole[file])

    run()
