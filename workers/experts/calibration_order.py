"""What a calibration of routers is asked to do, as plain data: a driver writes it, a worker is sent it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from workers.storage import Store
from workers.storage.documents import (
    anything,
    damage_named,
    each,
    keys,
    read_document,
    table,
    text,
    whole,
)

SHRINK = 0.9
ITERATIONS = 1000
TOLERANCE = 1e-6
"""Of HARC's published script, as are the two above; see `harc`."""

RECORDS = "calibration-in-progress"
"""The folder of what is finished: a record for each layer."""

LAYER = keys(
    {
        "name": text,
        "stored": text,
        "dtype": text,
        "shape": each(whole),
        "values": text,
        "sha256": text,
        "tokens": anything,
        "solution": table(anything),
        "routing": anything,
    }
)


@dataclass(frozen=True)
class CalibrationOrder:
    """What is to be calibrated: plain data, that a worker is sent."""

    recipe: dict[str, Any]
    """Of the child with the routers that the calibration starts from."""
    texts: dict[str, tuple[str, ...]]
    """Donor -> the prompts that its routing is to be kept on."""
    held_out: dict[str, tuple[str, ...]]
    """Donor -> prompts that the calibration does not see, for the comparison."""
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further kinds of routers to compare, beside those kept and those calibrated: name -> recipe."""
    shrink: float = SHRINK
    iterations: int = ITERATIONS
    tolerance: float = TOLERANCE
    dtype: str = "auto"
    device: str = "cpu"


def record_of(layer: int) -> str:
    """The key of a layer's record."""
    return f"{RECORDS}/layer-{layer:05}.json"


def write_record(place: Store, layer: int, found: dict[str, Any]) -> dict[str, Any]:
    """Keep what was found of a layer, its router's bytes under `values`; the record as it is read again."""
    values = found["values"]
    record = found | {
        "values": base64.b64encode(values).decode(),
        "sha256": hashlib.sha256(values).hexdigest(),
    }
    place.create(record_of(layer), json.dumps(record).encode())
    return record


def read_record(place: Store, layer: int) -> dict[str, Any]:
    """See `write_record`. Raises `ObjectNotFoundError`, and `BadInputError` for a damaged one."""
    record = read_document(place, record_of(layer), LAYER)
    with damage_named(f"{place.uri}/{record_of(layer)}"):
        if hashlib.sha256(router_bytes(record)).hexdigest() != record["sha256"]:
            raise ValueError("values have another sha256")
    return record


def router_bytes(record: dict[str, Any]) -> bytes:
    """The router of a record, as it is stored."""
    return base64.b64decode(record["values"], validate=True)
