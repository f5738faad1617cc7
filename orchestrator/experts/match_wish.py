"""What a recipe file says of experts that are to be matched first: `match_experts` and `sets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.experts.matching import WAYS
from orchestrator.mri.probe import load_calibration_sets
from workers.diagnostics.calibration import CalibrationSet
from workers.errors import BadInputError


@dataclass(frozen=True)
class MatchWish:
    """How experts are to be matched."""

    by: str
    sets: tuple[CalibrationSet, ...] = ()
    """The prompts for a matching by outputs."""


def match_wish(path: str, data: dict[Any, Any]) -> MatchWish | None:
    """The wish of a recipe file's data; None if it has none. Raises `BadInputError` naming file and key."""
    by, sets = data.get("match_experts"), data.get("sets")
    if sets is not None and by != "outputs":
        raise BadInputError(f"{path}: sets: are the prompts of `match_experts: outputs`")
    if by is None:
        return None
    if by not in WAYS:
        raise BadInputError(f"{path}: match_experts: {by!r} is none of {', '.join(WAYS)}")
    for key in ("experts", "layers"):
        if data.get(key):
            raise BadInputError(f"{path}: match_experts: does not go with `{key}`: leave one out")
    if sets is not None and not (
        isinstance(sets, list) and sets and all(isinstance(name, str) for name in sets)
    ):
        raise BadInputError(f"{path}: sets: {sets!r} is not a list of names or files")
    return MatchWish(by, load_calibration_sets(sets or ()) if by == "outputs" else ())
