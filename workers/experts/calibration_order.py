"""What a calibration of routers is asked to do, as plain data: a driver writes it, a worker is sent it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from workers.storage import Store

SHRINK = 0.9
ITERATIONS = 1000
TOLERANCE = 1e-6
"""Of HARC's published script, as are the two above; see `harc`."""

RECORDS = "calibration-in-progress"
"""The folder of what is finished: a record for each layer."""


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
    """See `write_record`. Raises `ObjectNotFoundError`."""
    record: dict[str, Any] = json.loads(place.read(record_of(layer)))
    return record


def router_bytes(record: dict[str, Any]) -> bytes:
    """The router of a record, as it is stored."""
    return base64.b64decode(record["values"])
