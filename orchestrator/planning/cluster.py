"""The machines that a plan is for: how many, and what each has."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from orchestrator.config import find_shipped, read_yaml
from workers.errors import BadInputError

GB = 10**9

RESOURCES = "resources"


@dataclass(frozen=True)
class Cluster:
    """Equal nodes. Sizes in GB (10^9 bytes), rates in GB/s."""

    nodes: int
    gpus_per_node: int
    cores_per_node: int
    gpu_memory: float
    node_memory: float
    disk_size: float
    nic: float
    """Of a node, to the others and to the store."""
    disk: float
    gpu_copy: float
    """From a node's memory to one GPU."""
    gpu_bandwidth: float
    core_merge: float
    """Of a child, that one core merges and compares with its parents."""
    core_scan: float
    """Of parents, that one core scans."""
    core_hash: float
    """Of a file, that one core reads back."""
    resources: dict[str, float] = field(default_factory=dict)
    """What else a node has for workers that ask for it by these names; the key may be missing."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_cluster(name: str, changes: dict[str, float | None]) -> Cluster:
    """The cluster of a name in `conf/cluster`, or of a file; `changes` that are not None count instead.

    Raises `BadInputError` naming the file and the key.
    """
    file = find_shipped("cluster", name)
    data = read_yaml(file)
    known = {field.name: field.type for field in fields(Cluster) if field.name != RESOURCES}
    if not isinstance(data, dict):
        raise BadInputError(f"{file}: not a cluster: it has no keys")
    resources = data.pop(RESOURCES, {})
    if not isinstance(resources, dict) or not all(_is_number(size) for size in resources.values()):
        raise BadInputError(
            f"{file}: {RESOURCES}: {resources!r} does not give a number to each name"
        )
    for key in [*data, *known]:
        if key not in known:
            raise BadInputError(f"{file}: there is no key {key}")
        if key not in data:
            raise BadInputError(f"{file}: the key {key!r} is missing")
    given = {key: value for key, value in changes.items() if value is not None}
    for key, value in (data | given).items():
        whole = known[key] == "int"
        good = type(value) is int or (type(value) is float and not whole)
        # Without GPUs a cluster is one of CPUs.
        if not good or not (value >= 0 if key == "gpus_per_node" else 0 < value < float("inf")):
            kind = "whole number" if whole else "number"
            where = f"--{key.replace('_', '-')}" if key in given else f"{file}: {key}"
            raise BadInputError(f"{where}: {value!r} is not a positive {kind}")
    return Cluster(**(data | given), resources={str(name): n for name, n in resources.items()})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")
