"""The configuration of what a campaign tells about itself: its log, and what its workers cost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

LOGS = ("text", "json")
"""What `darwin run` writes to standard error: lines and a live view for people, or JSON lines."""


@dataclass
class CostConfig:
    """What a worker costs; it may change when a campaign is resumed, and counts for all of it then."""

    per_hour: float | None = None
    """The price of one worker for an hour; each of a gang counts."""
    currency: str = "USD"


def check_watching(cost: CostConfig, log: str, refuse: Callable[[str, str], None]) -> None:
    """Refuse values that cannot be."""
    if log not in LOGS:
        refuse("log", f"{log!r} is none of {', '.join(LOGS)}")
    if cost.per_hour is not None and not (math.isfinite(cost.per_hour) and cost.per_hour >= 0):
        refuse("cost.per_hour", f"{cost.per_hour} is not a price: 0 or more")
    if not re.fullmatch(r"[A-Z]{3}", cost.currency):
        refuse("cost.currency", f"{cost.currency!r} is no code of three capital letters, as USD is")
