"""arcee_fusion: the father takes from the mother what is important by far."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from workers.merging.methods.gram import LANES, float64_buffer, sum_by_halves
from workers.merging.methods.magnitudes import BIN_SHIFT, BinCounts
from workers.merging.methods.method import MergeMethod, Slice, Values, register

if TYPE_CHECKING:
    from torch import Tensor

QUARTILES = (0.25, 0.5, 0.75)


class ImportanceTable:
    """How many elements lie in each bin of importance, a 256th of a power of two wide."""

    def __init__(self, values: Values) -> None:
        self.found = BinCounts()

    def update(self, piece: Slice) -> None:
        spare, _ = piece.parents.values()
        self.found.add(importances(piece), spare)

    def merge(self, other: ImportanceTable) -> None:
        self.found.merge(other.found)

    def finish(self) -> float:
        """The threshold: median + 1.5 (third - first quartile), the values rounded down to their bins."""
        upto = self.found.counts.cumsum()
        ranks = [int(share * (int(upto[-1]) - 1)) + 1 for share in QUARTILES]
        first, median, third = (
            struct.unpack("<f", struct.pack("<I", int(upto.searchsorted(rank)) << BIN_SHIFT))[0]
            for rank in ranks
        )
        return float(median + 1.5 * (third - first))


def importances(piece: Slice) -> Tensor:
    """|x_2 - x_1| KL(softmax x_2 || softmax x_1), KL for each row; into `piece.out`."""
    import torch

    father, mother = piece.parents.values()
    divergences = row_divergences(mother, father).unsqueeze(1)
    return torch.sub(mother, father, out=piece.out).mul_(divergences).abs_()


def row_divergences(one: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(one) || softmax(other)) of each row: fp32 `[rows]` of `[rows, columns]`.

    In float64, for what is left of it between close relatives is the ten-millionth part of its terms. Its
    last bits differ between processors as their exponentials do; in fp32 that shows in about one of 10^7
    rows, and in the child only if an element of it is at the very threshold.
    """
    import torch

    most = max(1, LANES // max(one.shape[1], 1))
    blocks = zip(torch.split(one, most), torch.split(other, most), strict=True)
    return torch.cat([_divergences(*block) for block in blocks]).float()


def _divergences(one: Tensor, other: Tensor) -> Tensor:
    """sum p (x - y) - (log sum exp x - log sum exp y), p = softmax x; float64 `[rows]`."""
    import torch

    room = float64_buffer((5, *one.shape), one.device)
    logits, terms = room[:2], room[2:]
    logits[0].copy_(one)
    logits[1].copy_(other)
    logits -= logits.amax(dim=2, keepdim=True)
    torch.exp(logits, out=terms[:2])
    torch.sub(logits[0], logits[1], out=terms[2]).mul_(terms[0])
    own, others, cross = sum_by_halves(terms)
    divergences: Tensor = cross / own - own.log() + others.log()
    return divergences.clamp_(min=0.0)


def merge(piece: Slice, values: Values) -> None:
    """out = x_2 where its importance is at least the threshold of the tensor, else x_1.

    Importance is |x_2 - x_1| times the divergence between the rows taken as logits; the threshold is the
    median plus 1.5 times the distance of the quartiles. The first parent is what mergekit calls the base.
    mergekit estimates the quartiles of more than a million elements from random ones, computes in the
    dtype of the parents, where for bf16 and for close relatives the divergence is rounding errors, and adds
    1e-8 to the probabilities.
    """
    import torch

    is_important = importances(piece).ge_(piece.statistic)
    father, mother = piece.parents.values()
    torch.add(father, mother.sub_(father).mul_(is_important), out=piece.out)


register(
    MergeMethod(
        name="arcee_fusion",
        summary="takes from the second parent what is important by far",
        parameters=(),
        merge=merge,
        parents=(2, 2),
        grain="row",
        statistic=ImportanceTable,
        statistic_grain="row",
    )
)
