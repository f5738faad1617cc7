"""Item results as a table: one Parquet file, which DuckDB, pandas and others open where it lies.

The ledger stays the truth; this file is derived from it, and written again by `darwin report`.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from orchestrator.ledger.ledger import Ledger, read_records
from orchestrator.ledger.state import CampaignState
from workers.errors import BadInputError
from workers.merging import ParentReference, passthrough_recipe
from workers.storage import Store

ITEMS_FILE = "items.parquet"

ROWS_AT_ONCE = 16_384
"""A row group, and all that is in memory of the table at any time."""

COLUMNS = {
    "campaign": "string",
    "recipe": "string",
    "role": "string",
    "name": "string",
    "generation": "int32",
    "split": "string",
    "protocol": "string",
    "task": "string",
    "item": "string",
    "category": "string",
    "score": "float64",
    "truncated": "bool_",
    "unparsed": "bool_",
    "output": "string",
    "calls": "int32",
    "tokens": "int64",
    "seconds": "float64",
}
"""Column -> its Arrow type. All of a file's columns are always there, and null where unknown."""


def write_items(store: Store, key: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write the rows as the Parquet object `key`, over what was there; its location.

    A row has any of `COLUMNS`, and nothing else. However many rows there are, no more than
    `ROWS_AT_ONCE` are held: the file is made on this machine's disk and appears in the store whole.
    """
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])
    remaining = iter(rows)
    with tempfile.TemporaryFile() as file:
        with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            while group := list(islice(remaining, ROWS_AT_ONCE)):
                unknown = {name for row in group for name in row} - COLUMNS.keys()
                assert not unknown, f"no such columns: {sorted(unknown)}"
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                del group  # or it would still be there while the next one is made
        file.flush()
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            store.write(key, view)
    return f"{store.uri}/{key}"


def item_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that one item's result fills; `result` is `workers.evaluation.ItemResult.to_dict`."""
    kept = ("category", "score", "truncated", "unparsed", "output", "calls", "tokens")
    return {"item": result["id"], **{name: result.get(name) for name in kept}}


def write_campaign_items(store: Store, ledger: Ledger, state: CampaignState) -> str:
    """Write the results of every item that the campaign in `store` has scored; their location.

    `ledger` and `state` are of this campaign. The results are read from the store once more: nobody has kept
    them.
    """
    return write_items(store, ITEMS_FILE, campaign_rows(ledger, state))


def campaign_rows(ledger: Ledger, state: CampaignState) -> Iterator[dict[str, Any]]:
    """One row for each recipe, split and item, in the order in which they were scored."""
    begun = ledger.last("campaign")
    if begun is None:
        raise BadInputError(f"{ledger.store.uri}: the campaign was stopped before it began")
    chosen = ledger.last("selected")
    roles = {
        recipe: {"role": "candidate", "generation": generation}
        for recipe, generation in _asked_in(state).items()
    }
    if chosen is not None:
        roles.setdefault(chosen["recipe"], {})["role"] = "child"
    names = _parents_by_recipe(begun["identity"].get("parents", ()))
    about = {"campaign": begun["config"]["name"], "protocol": "greedy"}
    repeated: dict[tuple[str, str, str], set[str]] = {}
    for record in read_records(ledger.store):
        if record["kind"] != "scored":
            continue
        recipe, split = record["recipe"], record["split"]
        evaluation = state.evaluation(recipe, split)
        # Shared evenly.
        seconds = evaluation.seconds / sum(map(len, evaluation.results.values()))
        role = roles.get(recipe, {"role": "parent", "name": names.get(recipe)})
        for task, results in record["items"].items():
            known = repeated.setdefault((recipe, split, task), set()) if evaluation.repeated else ()
            for result in {result["id"]: result for result in results}.values():
                if result["id"] not in known:
                    yield {
                        **about, **role, "recipe": recipe, "split": split, "task": task,
                        "seconds": seconds, **item_columns(result),
                    }  # fmt: skip
            if isinstance(known, set):
                known.update(result["id"] for result in results)


def _asked_in(state: CampaignState) -> dict[str, int | None]:
    """Recipe -> the generation in which it was first asked for, in that order; None if there are none."""
    found: dict[str, int | None] = {}
    for number, asked in enumerate(state.generations):
        for candidate in asked:
            found.setdefault(candidate.recipe_id, None if state.is_steady else number)
    return found


def _parents_by_recipe(parents: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The id of the recipe that is nothing but a parent -> the parent's name."""
    references = tuple(ParentReference(parent["name"], parent["content"]) for parent in parents)
    return {passthrough_recipe(references, known.name).id: known.name for known in references}
