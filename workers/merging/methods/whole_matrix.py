"""What the methods on whole matrices share: task vectors in float64, singular values from Gram matrices.

Eigenvectors of a Gram matrix in float64 take as long as an SVD in fp32, a third of the time of one in
float64, and the memory of a few squares of the shorter side. Singular vectors are right to fp32 down to
1e-4 of the greatest singular value, and those below `SMALLEST_SINGULAR_VALUE` are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.merging.methods.method import Parameter, Slice, Values

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 512
"""So many rows (or columns) of a matrix are in float64 at once."""

SMALLEST_SINGULAR_VALUE = 2.0**-20
"""Of the greatest one. In a Gram matrix in float64, and in fp32 weights, what is smaller is noise."""

Blocks = Callable[[slice], "Tensor"]
"""Part of the longer side -> these columns of a lying matrix, in float64, to be overwritten at will."""

PARAMETERS = (
    Parameter("weight", "per_parent", default=1.0),
    Parameter("lambda", "shared", default=1.0),
)
"""Of a method that adds lambda times something made of w_i (x_i - x_0) to the base."""


@dataclass(frozen=True, slots=True)
class TaskVector:
    """w_i (x_i - x_0) of one parent."""

    parent: str
    read: Blocks
    squared_norm: float


class Lying:
    """The slice's matrices `[out, in]`, seen lying: transposed if they have more rows than columns."""

    def __init__(self, piece: Slice) -> None:
        self.piece = piece
        rows, columns = piece.out.shape
        self.is_tall = rows > columns
        self.short, self.long = min(rows, columns), max(rows, columns)

    def parts(self) -> Iterator[slice]:
        """The longer side, cut."""
        for start in range(0, self.long, BLOCK):
            yield slice(start, min(start + BLOCK, self.long))

    def view(self, matrix: Tensor, part: slice) -> Tensor:
        """These columns of the matrix as it lies."""
        return matrix[part].T if self.is_tall else matrix[:, part]

    def change(self, matrix: Tensor, weight: float = 1.0) -> Blocks:
        """weight (matrix - base)."""
        base = self.piece.base
        assert base is not None

        def read(part: slice) -> Tensor:
            return self.view(matrix, part).double().sub_(self.view(base, part)).mul_(weight)

        return read

    def task_vectors(self, weights: dict[str, float]) -> list[TaskVector]:
        """One of each parent, in the recipe's order; of a norm that is not finite if an element is not."""
        vectors = []
        for name, parent in self.piece.parents.items():
            read = self.change(parent, weights[name])
            norm = sum(float(read(part).square_().sum()) for part in self.parts())
            vectors.append(TaskVector(name, read, norm))
        return vectors

    def product(self, one: Blocks, two: Blocks) -> Tensor:
        """one two^T, `[short, short]`; of a matrix with itself its Gram matrix."""
        import torch

        shape = (self.short, self.short)
        result = torch.zeros(shape, dtype=torch.float64, device=self.piece.out.device)
        for part in self.parts():
            left = one(part)
            result.addmm_(left, (left if one is two else two(part)).T)
        return result

    def write(self, change: Blocks) -> None:
        """out = base + change, rounded once."""
        assert self.piece.base is not None
        for part in self.parts():
            child = change(part).add_(self.view(self.piece.base, part))
            self.view(self.piece.out, part).copy_(child)


def singular_values(gram: Tensor, floor: float = SMALLEST_SINGULAR_VALUE) -> tuple[Tensor, Tensor]:
    """Of a lying matrix A with A A^T = gram: singular values `[r]`, the greatest first, and the left
    singular vectors `[short, r]`. Those not above `floor` times the greatest are left out."""
    import torch

    squares, vectors = torch.linalg.eigh(gram)
    first = int((squares <= floor * floor * float(squares[-1])).sum())
    return squares[first:].flip(0).sqrt_(), vectors[:, first:].flip(1)


def merge_matrix(
    piece: Slice, values: Values, merge: Callable[[Lying, list[TaskVector], Values], None]
) -> None:
    """`merge(lying, task vectors that are not zero, values)` for a matrix that has one, with one thread.

    Everything else gets x_0 + lambda/K sum_i w_i (x_i - x_0), element by element: vectors and tables,
    matrices that nobody changed, and those with values that are not finite, so that they are found.
    """
    if piece.is_matrix:
        with one_thread():
            lying = Lying(piece)
            vectors = lying.task_vectors(values["weight"])
            changed = [vector for vector in vectors if vector.squared_norm != 0.0]
            if changed and all(math.isfinite(vector.squared_norm) for vector in changed):
                merge(lying, changed, values)
                return
    merge_mean(piece, values)


def merge_mean(piece: Slice, values: Values) -> None:
    """out = x_0 + lambda/K sum_i w_i (x_i - x_0), by operations that round once each."""
    assert piece.base is not None
    piece.out.zero_()
    for name, parent in piece.parents.items():
        piece.out.add_(parent.sub_(piece.base).mul_(values["weight"][name]))
    piece.out.mul_(values["lambda"] / len(piece.parents)).add_(piece.base)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums inside BLAS and LAPACK take another order for another number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
