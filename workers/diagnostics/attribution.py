"""Attribution: which parent a child's weights come from, measured from its bytes.

The child is projected onto what can be reached from its parents (and the base, if there is one) by
combinations whose coefficients sum to 1: child ~ sum a_i x_i. With a base that is the projection onto the
task vectors d_i = x_i - x_0, whose coefficients a_i are free, and a_0 = 1 - sum a_i; without one no parent
is preferred, and any of them as the origin gives the same a_i.

All that is read of the weights are inner products of differences, in float64. They add up over chunks and
over tensors, so a group of tensors (a component, a layer) is solved like one long tensor. The mean of the
tensors' own coefficients would let those count as much as any in which the parents hardly differ, where
rounding alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from workers.checkpoints.checkpoint import Checkpoint, open_weight_file
from workers.merging.methods.gram import LANES, lanes, pair_products, symmetric
from workers.merging.plan import BASE

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from workers.checkpoints import LogicalTensor
    from workers.checkpoints.layout import Layout
    from workers.merging.executor import Run
    from workers.merging.sources import Source
    from workers.storage import Store

CHUNK_ELEMENTS = 1 << 21
"""The grid: products are taken over so many elements of a tensor, and added up in its order. Who does how
many chunks at once, and where, therefore changes no bit."""

BLOCK_ELEMENTS = 1 << 17
"""Differences are made so many at a time, to stay in a core's cache."""

NEGLIGIBLE = 1e-13
"""Directions whose squared length is this share of the greatest are taken for none: rounding of float64."""


@dataclass
class Products:
    """Inner products over some elements of one tensor of the child."""

    points: tuple[str, ...] = ()
    """The parents that have the tensor, in their order, and `base`, if it has it: what the child is
    compared with. The base, or else the first of them, is the origin."""
    sums: list[float] = field(default_factory=list)
    """y_i . y_j for j <= i, y the child and then each point but the origin, less the origin."""
    changed: dict[str, int] = field(default_factory=dict)
    """Point -> how many elements of the child have other bits."""

    @cached_property
    def apart(self) -> float:
        """The squared distance of the child to the nearest combination. Asked for when all is added."""
        gram = _aligned(self, [*self.points])
        return _distance(gram, _project(gram)[0])

    def add(self, other: Products) -> None:
        """Add what was found in the next elements of the same tensor."""
        assert self.points == other.points
        self.sums = [mine + more for mine, more in zip(self.sums, other.sums, strict=True)]
        for name, count in other.changed.items():
            self.changed[name] += count


@dataclass(frozen=True)
class Attribution:
    """What a group of the child's tensors is made of."""

    coefficients: dict[str, float]
    """a_i of each parent, and of the base: they sum to 1. 1.0 is all of a parent's task vector; a negative
    one says that the child lies on the far side of the others, away from that parent (or, for the base,
    that the task vectors were added up beyond an average). Where points cannot be told apart the smallest
    coefficients are taken, which share evenly what belongs to these points together."""
    shares: dict[str, float] | None
    """The positive coefficients over their sum, so that shares sum to 1; where none is negative they are
    the coefficients. None if nothing can be told apart."""
    undetermined: tuple[str, ...]
    """Points that cannot be told from some other one here."""
    explained: float | None
    """1 - |child - combination|^2 / mean_i |child - x_i|^2, the combination chosen for each tensor by
    itself: of the distances to the parents (and the base), how much is due to their being mixed. What is
    left is something else: dropped or chosen elements, rounding, training, another model. None where the
    points are all the same."""
    uniform: float | None
    """The same with the group's one combination: less, if its tensors were mixed differently."""
    residual: float | None
    """|child - combination| / sqrt(elements), tensor by tensor as for `explained`. None if a product is not
    finite, and then there is nothing else."""


def cut_chunks(tensors: Iterable[LogicalTensor]) -> Iterator[tuple[str, int]]:
    """(name, first element) of each chunk of the child's tensors, in order; an empty one has one chunk."""
    for tensor in tensors:
        for first in range(0, max(tensor.elements, 1), CHUNK_ELEMENTS):
            yield tensor.name, first


def read_unpublished(store: Store, layout: Layout) -> Checkpoint:
    """A child whose files are written but not yet published as a checkpoint, by the headers it has."""
    files = tuple(open_weight_file(store, store.info(file.name)) for file in layout.weight_files)
    return Checkpoint(store, layout.config, files, ())


def measure_chunk(run: Run, child: Source, tensor: LogicalTensor, first: int) -> Products:
    """The products over the chunk of the child's `tensor` that begins with the element `first`.

    `run` is over parents and base, and knows which of their layers, and of their tokens' rows, belong to
    those of the child. A parent that has no such tensor, or one of another shape, is no point.
    """
    count = min(CHUNK_ELEMENTS, tensor.elements - first)
    points = {}
    for name in run.merger.sources:
        own = run.plan.source(name, tensor)
        if own is None:
            continue
        if run.plan.has_mapped_rows(tensor) or own.shape == tensor.shape:
            points[name] = run.read(name, tensor, first, count)
    return measure(child.read(tensor, first, count), points)


def measure(child: Tensor, points: Mapping[str, Tensor]) -> Products:
    """The products over one chunk. `child` and every point are flat and of one length, in any dtype.

    Each difference is rounded once to float64, and the order of every sum depends on the length alone.
    """
    import torch

    from workers.merging.child import count_changes

    names = tuple(points)
    changed = {name: count_changes(child, values) for name, values in points.items()}
    if not points or not child.is_floating_point():
        return Products((), [], changed)
    origin = origin_of(names)
    vectors = [child, *(values for name, values in points.items() if name != origin)]
    rows = torch.empty((len(vectors), min(BLOCK_ELEMENTS, len(child))), dtype=torch.float64)
    zero = torch.empty(rows.shape[1], dtype=torch.float64)
    total = [0.0] * (len(vectors) * (len(vectors) + 1) // 2)
    for first in range(0, len(child), BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, len(child) - first)
        zero[:count].copy_(points[origin][first : first + count])
        for row, vector in zip(rows, vectors, strict=True):
            row[:count].copy_(vector[first : first + count]).sub_(zero[:count])
        block = [row[:count].view(1, count) for row in rows]
        found = pair_products(block, lanes(block[0], LANES))[:, 0].tolist()
        total = [one + other for one, other in zip(total, found, strict=True)]
    return Products(names, total, changed)


def origin_of(points: tuple[str, ...]) -> str:
    """The point that differences are taken from."""
    return BASE if BASE in points else points[0]


def attribute(group: Iterable[Products], elements: int) -> Attribution | None:
    """The attribution of the tensors of a group, given their products; None if there is nothing to compare.

    `elements` is their number. A tensor that lacks one of the group's points tells nothing about it: it
    counts there as the origin does.
    """
    import numpy

    found = [products for products in group if products.points]
    points = [*dict.fromkeys(name for products in found for name in products.points)]
    if not found:
        return None
    gram = numpy.sum([_aligned(products, points) for products in found], axis=0)
    if not numpy.isfinite(gram).all():
        return Attribution({}, None, tuple(points), None, None, None)
    if BASE in points:
        gram, points = _without_base_if_taken(gram, points)
    coefficients, undetermined = _project(gram)
    apart = sum(products.apart for products in found)
    together = _distance(gram, coefficients)
    distances = gram[0, 0] - 2.0 * gram[0, 1:] + numpy.diagonal(gram)[1:]
    distance = float(distances.mean())
    one_point = _is_one_point(gram)
    positive = coefficients.clip(0.0)
    named = [name for name, free in zip(points, undetermined, strict=True) if free]
    return Attribution(
        coefficients=dict(zip(points, map(float, coefficients), strict=True)),
        shares=None
        if one_point and len(points) > 1
        else dict(zip(points, map(float, positive / positive.sum()), strict=True)),
        undetermined=tuple(named),
        explained=None if one_point else 1.0 - min(apart / distance, 1.0),
        uniform=None if one_point else 1.0 - min(together / distance, 1.0),
        residual=(apart / max(elements, 1)) ** 0.5,
    )


def _aligned(products: Products, points: list[str]) -> numpy.ndarray:
    """The Gram matrix of the child and these points, with zeros for the origin and those that are missing."""
    import numpy

    origin = origin_of(products.points)
    places = [0, *(1 + points.index(name) for name in products.points if name != origin)]
    gram = numpy.zeros((1 + len(points), 1 + len(points)))
    gram[numpy.ix_(places, places)] = symmetric(products.sums)
    return gram


def _without_base_if_taken(
    gram: numpy.ndarray, points: list[str]
) -> tuple[numpy.ndarray, list[str]]:
    """Without the base, if some parent equals it throughout the group: then it is that parent's share."""
    import numpy

    place = 1 + points.index(BASE)
    distances = numpy.diagonal(gram) - 2.0 * gram[place] + gram[place, place]
    if not any(distances[1 + n] <= 0.0 for n, name in enumerate(points) if name != BASE):
        return gram, points
    kept = [n for n in range(len(gram)) if n != place]
    return gram[numpy.ix_(kept, kept)], [name for name in points if name != BASE]


def _project(gram: numpy.ndarray) -> tuple[numpy.ndarray, list[bool]]:
    """Coefficients a, sum 1, of the points nearest to the child; and which points are undetermined.

    `gram` `[1 + points, 1 + points]`: the child first. Among equally near combinations the one nearest to
    all coefficients being equal.
    """
    import numpy

    points = len(gram) - 1
    even = numpy.full(points, 1.0 / points)
    if points == 1:
        return even, [False]
    # Orthonormal directions that leave the sum of the coefficients as it is.
    free = numpy.linalg.qr(numpy.eye(points) - 1.0 / points)[0][:, : points - 1]
    between = free.T @ gram[1:, 1:] @ free
    lengths, directions = numpy.linalg.eigh(between)
    told = lengths > NEGLIGIBLE * max(float(lengths[-1]), 0.0)
    wanted = directions.T @ (free.T @ (gram[1:, 0] - gram[1:, 1:] @ even))
    steps = numpy.divide(wanted, lengths, out=numpy.zeros_like(wanted), where=told)
    hidden = free @ directions[:, ~told]
    undetermined = (abs(hidden) > 1e-6).any(axis=1) if hidden.size else numpy.zeros(points, bool)
    return even + free @ (directions @ steps), [bool(one) for one in undetermined]


def _distance(gram: numpy.ndarray, coefficients: numpy.ndarray) -> float:
    """|child - sum a_i x_i|^2, wherever the origin is, as the coefficients sum to 1."""
    import numpy

    combination = numpy.concatenate(([1.0], -coefficients))
    return max(float(combination @ gram @ combination), 0.0)


def _is_one_point(gram: numpy.ndarray) -> bool:
    """Whether all points are the same."""
    import numpy

    own = numpy.diagonal(gram)[1:]
    distances = own[:, None] - 2.0 * gram[1:, 1:] + own[None, :]
    return bool((distances <= 0.0).all())


def to_dict(found: Attribution) -> dict[str, Any]:
    """Plain data, rounded: the last bits of a solution are the linear algebra library's."""
    return {
        "coefficients": {name: _rounded(value) for name, value in found.coefficients.items()},
        "shares": None
        if found.shares is None
        else {name: _rounded(value) for name, value in found.shares.items()},
        "undetermined": list(found.undetermined),
        "explained": None if found.explained is None else _rounded(found.explained),
        "uniform": None if found.uniform is None else _rounded(found.uniform),
        "residual": None if found.residual is None else float(f"{found.residual:.6g}"),
    }


def _rounded(value: float) -> float:
    return round(value, 6) + 0.0  # no -0.0
