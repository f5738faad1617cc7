"""breadcrumbs: drop the largest and the smallest changes (arXiv 2312.06795), then add up or elect.

As in mergekit, `gamma` is the share of the largest that is dropped, less if `density` leaves no room for
it, and `density` the share that is kept below them, both rounded down. But shares are cut at whole magnitude
bins, so that equal magnitudes have one fate: no more than `gamma` is dropped above, no less than `density`
is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from workers.merging.methods.consensus import merge_agreeing, merge_sum, task_vector_parameters
from workers.merging.methods.magnitudes import Magnitudes, magnitude_table
from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

if TYPE_CHECKING:
    from torch import Tensor


def window(total: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest of `total` elements to drop, and down to which rank to keep."""
    kept = math.floor(density * total)
    dropped = min(math.floor(gamma * total), total - kept)
    return dropped, dropped + kept if kept else 0


def keep_middle(delta: Tensor, found: Magnitudes, dropped: int, last: int, spare: Tensor) -> None:
    """Set to zero what is larger or smaller than the elements between these ranks."""
    import torch

    hardshrink = torch.ops.aten.hardshrink.out
    smallest, largest = found.bound_keeping(last), found.bound_dropping(dropped)
    if smallest >= largest:
        delta.mul_(0.0)  # what is not finite stays so
        return
    if largest < math.inf:
        hardshrink(delta, largest, out=spare)
    if smallest > 0.0:
        hardshrink(delta, smallest, out=delta)
    if largest < math.inf:
        delta.sub_(spare)


def merge_with(consensus: Callable[..., None]) -> Callable[[Slice, Values], None]:
    def merge(piece: Slice, values: Values) -> None:
        """Keep the middle of each task vector's magnitudes, then the consensus."""
        assert piece.base is not None
        factors = dict.fromkeys(piece.parents, 1.0)
        for name, parent in piece.parents.items():
            delta, density = parent.sub_(piece.base), values["density"][name]
            if density == 1.0:
                continue
            found = piece.statistic[name]
            dropped, last = window(found.total, density, values["gamma"][name])
            keep_middle(delta, found, dropped, last, piece.scratch(0))
            if values["rescale"] == "inverse_density" and density:
                factors[name] = 1.0 / density
            elif values["rescale"] == "l1":
                factors[name] = found.norm_ratio(last, dropped)
        consensus(piece, values, factors)

    return merge


for _name, _consensus, _least, _then in (
    ("breadcrumbs", merge_sum, 0, "add up"),
    ("breadcrumbs_ties", merge_agreeing, 2, "TIES sign election"),
):
    register(
        MergeMethod(
            name=_name,
            summary=f"drop the largest and the smallest changes (arXiv 2312.06795), then {_then}",
            parameters=task_vector_parameters(
                0.0, "none", Parameter("gamma", "per_parent", low=0.0, high=1.0, default=0.01)
            ),
            merge=merge_with(_consensus),
            uses_base="always",
            least_task_vectors=_least,
            statistic=magnitude_table,
        )
    )
