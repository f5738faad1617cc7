"""ram, ramplus: what one parent alone has changed is kept whole, the rest averaged (arXiv 2601.13572).

A parent has changed an element if its difference to the base is greater than `epsilon`; a smaller one is
dropped. RAM+ makes up for what averaging takes from a parent by enlarging what it alone has changed. Its
rho is that of each tensor, as in mergekit's `ramplus_tl`; the paper's is that of the whole model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = Parameter("epsilon", "shared", low=0.0, default=1e-5)


def take_changes(piece: Slice, epsilon: float) -> Tensor:
    """Turn the parents into task vectors without small changes; by how many each element is changed.

    In scratch buffer 0; 1 is used.
    """
    import torch

    assert piece.base is not None
    contributors, changed = piece.scratch(0).zero_(), piece.scratch(1)
    for parent in piece.parents.values():
        delta = parent.sub_(piece.base)
        if epsilon > 0.0:
            torch.ops.aten.hardshrink.out(delta, epsilon, out=delta)
        contributors.add_(torch.sign(delta, out=changed).abs_())
    return contributors


class Overlap:
    """Per parent: how many elements others have changed too, and how many it alone."""

    def __init__(self, values: Values) -> None:
        self._epsilon = values["epsilon"]
        self.shared: dict[str, int] = {}
        self.unique: dict[str, int] = {}

    def update(self, piece: Slice) -> None:
        import torch

        contributors = take_changes(piece, self._epsilon)
        is_unique = torch.eq(contributors, 1.0, out=contributors)
        for name, delta in piece.parents.items():
            changed = delta.sign_().abs_()
            # Sums of ones, whole numbers in any order.
            all_changed = int(changed.sum(dtype=torch.float64).nan_to_num_(0.0))
            alone = int(changed.mul_(is_unique).sum(dtype=torch.float64).nan_to_num_(0.0))
            self.shared[name] = self.shared.get(name, 0) + all_changed - alone
            self.unique[name] = self.unique.get(name, 0) + alone

    def merge(self, other: Overlap) -> None:
        for own, others in ((self.shared, other.shared), (self.unique, other.unique)):
            for name, count in others.items():
                own[name] = own.get(name, 0) + count

    def finish(self) -> dict[str, float]:
        """rho: shared over unique."""
        return {
            name: shared / self.unique[name] if self.unique[name] else math.inf if shared else 0.0
            for name, shared in self.shared.items()
        }


def merge_ram(piece: Slice, values: Values) -> None:
    """out = x_0 + the mean of the d_i of the parents that have changed the element."""
    import torch

    assert piece.base is not None
    contributors = take_changes(piece, values["epsilon"])
    total = piece.out.zero_()
    for delta in piece.parents.values():
        total.add_(delta)
    total.div_(contributors.clamp_(min=1.0))
    torch.add(piece.base, total, out=piece.out)


def merge_ramplus(piece: Slice, values: Values) -> None:
    """As `merge_ram`, but d_i of parent i alone is multiplied by 1 + r min(rho_i, alpha)."""
    import torch

    assert piece.base is not None
    contributors = take_changes(piece, values["epsilon"])
    total, enlarged = piece.out.zero_(), piece.scratch(1).zero_()
    for name, delta in piece.parents.items():
        total.add_(delta)
        enlarged.add_(delta.mul_(values["r"] * min(piece.statistic[name], values["alpha"])))
    is_unique = torch.eq(contributors, 1.0, out=piece.scratch(2))
    total.div_(contributors.clamp_(min=1.0))
    total.add_(enlarged.mul_(is_unique))
    torch.add(piece.base, total, out=piece.out)


register(
    MergeMethod(
        name="ram",
        summary="unique changes whole, shared ones averaged (arXiv 2601.13572)",
        parameters=(EPSILON,),
        merge=merge_ram,
        uses_base="always",
    )
)
register(
    MergeMethod(
        name="ramplus",
        summary="as ram, unique changes enlarged by what averaging takes (arXiv 2601.13572)",
        parameters=(
            EPSILON,
            Parameter("r", "shared", low=0.0, default=0.1),
            Parameter("alpha", "shared", low=0.0, default=0.2),
        ),
        merge=merge_ramplus,
        uses_base="always",
        statistic=Overlap,
        statistic_parameters=("epsilon",),
    )
)
