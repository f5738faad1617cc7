"""The prescription: from the scan of the parents to the share that it advises each to have in a tensor.

    MRI(T) = alpha * Static(T) + (1 - alpha) * Probe(T),   r_MRI(T) = MRI_B(T) / (MRI_A(T) + MRI_B(T))

are published (arXiv 2605.14386, alpha = 0.5; the cards of engine V6 print 0.4 * static + 0.6 * probe). How
entropy, spread and norm become one Static, and to which tensors a probe of a layer belongs, is not
public; what stands here is ours. With more parents than two the shares are MRI_i / sum of all MRI.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from orchestrator.genomes.parameter_file import DECIMALS
from orchestrator.mri.importance import static_importance
from workers.errors import BadInputError

LEAST_DISPERSION = 0.01
"""A prescription whose shares spread by less (their standard deviation over the weights) tells nothing: to
follow it is to blend everything alike."""

PROBE_POSITION = "mean_token"
"""Which of the probe's two distances counts."""

PROBED_AS = {
    "attention": "attention",
    "linear_attention": "attention",
    "mlp": "mlp",
    "expert": "mlp",
    "shared_expert": "mlp",
    "router": "mlp",
}
"""Component -> the probe of its layer that is about it; all others of a layer take the mean of both."""

Values = dict[str, float]
"""Parent -> a number."""

ExpertShares = dict[int, dict[str, tuple[float | None, ...]]]
"""Layer -> donor -> its share of each expert; None where nothing is advised."""


@dataclass(frozen=True)
class Prescription:
    """The shares that a scan advises."""

    shares: dict[str, Values]
    """Tensor -> parent -> its share; they sum to 1. Tensors that cannot be measured are not in it."""
    dispersion: float
    """Standard deviation of a parent's share over the weights, the largest of the parents'."""
    is_telling: bool
    """Whether the shares differ enough between tensors to say anything."""
    equal: frozenset[str] = frozenset()
    """Tensors that are the same in all parents, and in the base if there is one."""
    experts: ExpertShares = field(default_factory=dict)
    """Instead of `shares`, for a space that decides expert by expert (see `expert_prescription`)."""

    @property
    def advised_experts(self) -> int:
        """The number of experts, over all layers, that have advice."""
        first_donor = (next(iter(of.values()), ()) for of in self.experts.values())
        return sum(share is not None for shares in first_donor for share in shares)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`."""
        data = {
            "dispersion": self.dispersion,
            "is_telling": self.is_telling,
            "equal": sorted(self.equal),
            "shares": self.shares,
        }
        if self.experts:
            data["experts"] = {str(layer): of for layer, of in self.experts.items()}
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Prescription:
        """Read what `to_dict` wrote."""
        return Prescription(
            data["shares"],
            data["dispersion"],
            data["is_telling"],
            frozenset(data["equal"]),
            {
                int(layer): {donor: tuple(shares) for donor, shares in of.items()}
                for layer, of in data.get("experts", {}).items()
            },
        )


def prescribe(scan: dict[str, Any], tensors: Collection[str], alpha: float) -> Prescription:
    """Shares of the named `tensors` from a scan's JSON; `alpha` is the weight of the static part.

    With one part alone, static or probe, that part is the MRI. No share is advised for what cannot be
    measured: a tensor of one element, one that is constant and the same everywhere, one that a parent
    lacks, and without a static part one that no probe is about.

    Raises `BadInputError` naming the tensor whose numbers are not finite, that is constant, or whose MRI
    is 0 in all parents: a share made of these would be a pretence.
    """
    parents = [parent["name"] for parent in scan["parents"]]
    rows = {row["tensor"]: row for row in scan["static"] if row["tensor"] in tensors}
    equal = frozenset(name for name, row in rows.items() if _is_equal(row))
    has_static = any(row.get("of") for row in rows.values())
    probes = _probes(scan.get("probe") or {}, parents)
    measured = {
        name: row
        for name, row in rows.items()
        if row["elements"] > 1 and (not has_static or _has_distribution(row, parents, equal))
    }
    static: dict[str, Values] = {}
    if has_static:
        for row in measured.values():
            _check_static(row, parents)
        static = static_importance(scan["static"], parents)
    shares = {}
    for name, row in measured.items():
        mri = _combine(static.get(name), _probe_of(probes, row), alpha)
        if mri is not None:
            shares[name] = _shares(name, mri)
    weights = {name: rows[name]["elements"] for name in shares}
    dispersion = round(_dispersion(shares, weights, parents), DECIMALS)
    return Prescription(shares, dispersion, dispersion >= LEAST_DISPERSION, equal)


def _check_static(row: dict[str, Any], parents: list[str]) -> None:
    for parent in parents:
        of = row["of"][parent]
        numbers = [of[key] for key in ("entropy", "std", "rms")]
        if of["nan"] or of["inf"] or any(n is None or not math.isfinite(n) for n in numbers):
            raise BadInputError(
                f"tensor {row['tensor']!r} of {parent} holds {of['nan']} NaN and {of['inf']} infinite "
                "values: no share can be advised for it. Repair the parent, or choose a genome space "
                "without a scan"
            )
        if of["std"] == 0.0:
            raise BadInputError(
                f"tensor {row['tensor']!r} is constant in {parent}, but not the same in all parents: its "
                "statistics say nothing, so no share can be advised for it. Leave its component "
                f"({row['component']}) out of the genome space, or do without a scan"
            )


def _is_equal(row: dict[str, Any]) -> bool:
    pairs = (row.get("between") or {}).values()
    return bool(pairs) and all(pair["changed"] == 0 for pair in pairs)


def _has_distribution(row: dict[str, Any], parents: list[str], equal: frozenset[str]) -> bool:
    """Whether all parents have the tensor, and it is not constant everywhere alike."""
    if not all(parent in row["of"] for parent in parents):
        return False
    constant = all(row["of"][parent]["std"] == 0.0 for parent in parents)
    return not (constant and row["tensor"] in equal)


def _probes(probe: dict[str, Any], parents: list[str]) -> dict[tuple[int, str], Values]:
    """(layer, "attention" or "mlp") -> parent -> its distance, the mean over the probe's sets."""
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for parent in parents if probe else ():
        for name, rows in probe["parents"][parent].items():
            for row in rows:
                place, value = (row["layer"], row["component"]), row[PROBE_POSITION]
                if value is None or not math.isfinite(value):
                    raise BadInputError(
                        f"the probe {name!r} of {parent} found {value} at the {place[1]} of layer "
                        f"{place[0]}: it adds nothing there, or nothing finite. Repair the parent, or set "
                        "scan.probe: false"
                    )
                found.setdefault(place, {}).setdefault(parent, []).append(value)
    return {
        place: {parent: math.fsum(values) / len(values) for parent, values in of.items()}
        for place, of in found.items()
    }


def _probe_of(probes: dict[tuple[int, str], Values], row: dict[str, Any]) -> Values | None:
    """What the probes say of a tensor: those of its layer that are about its component."""
    about = PROBED_AS.get(row["component"])
    kinds = [about] if about else ["attention", "mlp"]
    found = [probes[row["layer"], kind] for kind in kinds if (row["layer"], kind) in probes]
    if not found:
        return None
    return {parent: math.fsum(of[parent] for of in found) / len(found) for parent in found[0]}


def _combine(static: Values | None, probe: Values | None, alpha: float) -> Values | None:
    if static is None or probe is None:
        return static or probe
    return {name: alpha * static[name] + (1.0 - alpha) * probe[name] for name in static}


def _shares(tensor: str, mri: Values) -> Values:
    total = math.fsum(mri.values())
    if not total > 0.0:
        raise BadInputError(
            f"tensor {tensor!r}: the scan finds nothing in it ({mri}), so no share can be advised; do "
            "without a scan, or leave its component out of the genome space"
        )
    return {parent: round(value / total, DECIMALS) for parent, value in mri.items()}


def _dispersion(shares: dict[str, Values], weights: dict[str, int], parents: list[str]) -> float:
    total = sum(weights.values())
    if not total:
        return 0.0

    def spread(parent: str) -> float:
        mean = math.fsum(shares[name][parent] * weights[name] for name in shares) / total
        return math.sqrt(
            math.fsum((shares[n][parent] - mean) ** 2 * weights[n] for n in shares) / total
        )

    return max(map(spread, parents))
