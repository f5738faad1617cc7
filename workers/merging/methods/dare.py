"""dare_linear, dare_ties: drop changes at random and rescale (arXiv 2311.03099), then add up or elect.

The paper divides the elements that are kept by the probability to be kept, `rescale: inverse_density`, so
that the expectation stays; mergekit restores the L1 norm of each tensor instead, `rescale: l1`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from workers.merging.methods.consensus import merge_agreeing, merge_sum, task_vector_parameters
from workers.merging.methods.method import MergeMethod, Slice, Values, register
from workers.merging.methods.random_masks import norms_left

if TYPE_CHECKING:
    from torch import Tensor


def keep_probability(piece: Slice, delta: Tensor, values: Values, name: str) -> float:
    """The same for all elements."""
    density: float = values["density"][name]
    return density


def merge_with(consensus: Callable[..., None]) -> Callable[[Slice, Values], None]:
    def merge(piece: Slice, values: Values) -> None:
        """Keep each element of d_i with probability density_i, then the consensus."""
        assert piece.base is not None
        factors = dict.fromkeys(piece.parents, 1.0)
        for name, parent in piece.parents.items():
            delta, density = parent.sub_(piece.base), values["density"][name]
            if density == 1.0:
                continue
            delta.mul_(piece.keep_mask(name, density))
            if values["rescale"] == "inverse_density" and density:
                factors[name] = 1.0 / density
            elif values["rescale"] == "l1":
                factors[name] = piece.statistic[name]
        consensus(piece, values, factors)

    return merge


_statistic = norms_left(keep_probability)
for _name, _consensus, _least, _then in (
    ("dare_linear", merge_sum, 0, "add up"),
    ("dare_ties", merge_agreeing, 2, "TIES sign election"),
):
    register(
        MergeMethod(
            name=_name,
            summary=f"drop at random and rescale (arXiv 2311.03099), then {_then}",
            parameters=task_vector_parameters(0.0, "inverse_density"),
            merge=merge_with(_consensus),
            uses_base="always",
            least_task_vectors=_least,
            statistic=_statistic,
            statistic_parameters=("density", "rescale"),
        )
    )
