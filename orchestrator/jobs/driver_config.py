"""The configuration of a submitted campaign's driver: what it reserves of the node that it runs on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class DriverConfig:
    """What is reserved for a submitted campaign's driver. With nothing at all Ray puts it on the head."""

    cpus: float = 0.1
    """A head without CPUs has no room for it, so that it lives on a worker node."""
    memory: float | None = None
    """GB; None reserves none."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom resources of the nodes that it may run on."""


def check_driver(config: DriverConfig, refuse: Callable[[str, str], None]) -> None:
    """Call `refuse(key, problem)` for a value that cannot be."""
    if not 0 <= config.cpus < math.inf:
        refuse("driver.cpus", f"{config.cpus} must be a number from 0 on")
    if config.memory is not None and not 0 < config.memory < math.inf:
        refuse("driver.memory", f"{config.memory} must be a number of GB above 0")
    for name, amount in config.resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            refuse(f"driver.resources.{name}", "is not a custom resource")
        if not 0 < amount < math.inf:
            refuse(f"driver.resources.{name}", f"{amount} must be a number above 0")
