"""ties: trim small changes, elect a sign per element, average those that agree (arXiv 2306.01708).

As mergekit it keeps floor(density n) elements of a tensor, at least one if density is not 0, but also what
else is in the last bin: equal magnitudes have one fate, where mergekit's unstable sort decides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from workers.merging.methods.consensus import merge_agreeing, task_vector_parameters
from workers.merging.methods.magnitudes import Magnitudes, magnitude_table
from workers.merging.methods.method import MergeMethod, Slice, Values, register

if TYPE_CHECKING:
    from torch import Tensor


def elements_kept(total: int, density: float) -> int:
    """How many of `total` elements a density stands for."""
    return max(math.floor(density * total), 1) if density else 0


def trim(delta: Tensor, found: Magnitudes, density: float) -> None:
    """Set to zero all but the largest `density` of a task vector."""
    import torch

    bound = found.bound_keeping(elements_kept(found.total, density))
    if bound > 0.0:
        torch.ops.aten.hardshrink.out(delta, bound, out=delta)


def trim_factor(found: Magnitudes, density: float, rescale: str) -> float:
    """What the elements that are left are multiplied by."""
    if rescale == "inverse_density":
        return 1.0 / density if density else 1.0
    if rescale == "l1":
        return found.norm_ratio(elements_kept(found.total, density))
    return 1.0


def merge(piece: Slice, values: Values) -> None:
    """Trim each task vector to its `density` largest elements, then `merge_agreeing`."""
    assert piece.base is not None
    factors = dict.fromkeys(piece.parents, 1.0)
    for name, parent in piece.parents.items():
        delta, density = parent.sub_(piece.base), values["density"][name]
        if density < 1.0:
            trim(delta, piece.statistic[name], density)
            factors[name] = trim_factor(piece.statistic[name], density, values["rescale"])
    merge_agreeing(piece, values, factors)


register(
    MergeMethod(
        name="ties",
        summary="trim, elect sign, disjoint merge (arXiv 2306.01708)",
        parameters=task_vector_parameters(normalize=1.0, rescale="none"),
        merge=merge,
        uses_base="always",
        least_task_vectors=2,
        statistic=magnitude_table,
    )
)
