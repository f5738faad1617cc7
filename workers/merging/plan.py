"""The plan: the father's tensors cut into merge units, and how each of them is to be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.errors import BadInputError
from workers.merging.methods import MergeMethod, get_method
from workers.merging.methods.method import Values
from workers.merging.recipe import Recipe, Selector

UNIT_BYTES = 64 << 20
"""A unit is at most this much of one parent, whatever the size of a tensor."""

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at once: a few fp32 buffers of 1 MiB stay in a core's cache. Units and the
statistics of a tensor lie on this grid, so neither bytes nor sums depend on who does what."""

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

MERGEABLE_DTYPES = ("F16", "BF16", "F32", "F64")
"""Arithmetic on others would average codes, not values."""


@dataclass(frozen=True, slots=True)
class MergeUnit:
    """Elements `first` to `first + count` of a logical tensor: the smallest piece worked on at once."""

    tensor: LogicalTensor
    """What is merged."""
    target: LogicalTensor
    """Where the result goes: `tensor` itself, but for a head that is stored beside the embedding it is
    tied to: it gets the embedding's values."""
    first: int
    count: int

    @property
    def starts_stored(self) -> bool:
        """Whether it is the beginning of the stored tensor."""
        return self.target.offset == 0 and self.first == 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """How one tensor is merged."""

    method: MergeMethod
    values: Values


class Plan:
    """Merge units for one set of layouts; recipes are assigned to it again and again.

    `maps` are the architecture maps of the parents by name, the father first, and `base` that of the
    base. Raises `BadInputError` if tensors of the same name differ in shape.
    """

    def __init__(self, maps: dict[str, ArchitectureMap], base: ArchitectureMap | None) -> None:
        self.maps = maps
        self.base = base
        self.father = next(iter(maps.values()))
        self.tied = _tied_head(self.father)
        self.units = tuple(unit for target in self.father.tensors for unit in self._units(target))
        self._selected: dict[Selector, frozenset[str]] = {}
        for other in [*maps.values(), *([base] if base else [])]:
            _check_shapes(self.father, other)

    def _units(self, target: LogicalTensor) -> list[MergeUnit]:
        tensor = self.father.by_name[EMBEDDING] if target.name == self.tied else target
        return _cut(tensor, target)

    def assign(self, recipe: Recipe) -> dict[str, Assignment]:
        """Logical name -> assignment, for every tensor of the father.

        Raises `BadInputError` for a rule that cannot work, naming the tensor where it is about one.
        """
        parents = tuple(parent.name for parent in recipe.parents)
        carry = Assignment(get_method("passthrough"), {"source": parents[0]})
        assigned = {}
        rules = [
            (self._select(rule.where), self._resolve(recipe, rule.method, rule.parameters))
            for rule in recipe.rules
        ]
        for tensor in self.father.tensors:
            if tensor.name == self.tied:
                continue  # merged as the embedding
            assignment = next((way for names, way in rules if tensor.name in names), carry)
            self._check_inputs(tensor, assignment, parents)
            assigned[tensor.name] = assignment
        return assigned

    def _resolve(self, recipe: Recipe, name: str, parameters: dict[str, Any]) -> Assignment:
        method = get_method(name)
        parents = tuple(parent.name for parent in recipe.parents)
        return Assignment(method, method.resolve(parameters, parents, recipe.base is not None))

    def _select(self, where: Selector) -> frozenset[str]:
        if where not in self._selected:
            names = frozenset(t.name for t in self.father.tensors if where.matches(t))
            if not names:
                raise BadInputError(
                    f"recipe: the rule for {where} matches no tensor of {self.father.checkpoint.location}"
                )
            self._selected[where] = names
        return self._selected[where]

    def _check_inputs(
        self, tensor: LogicalTensor, assignment: Assignment, parents: tuple[str, ...]
    ) -> None:
        needed = [assignment.values["source"]] if assignment.method.copies else list(parents)
        inputs = [(name, self.maps[name]) for name in needed]
        if assignment.method.uses_base and self.base is not None:
            inputs.append(("base", self.base))
        for name, parent in inputs:
            if tensor.name not in parent.by_name:
                raise BadInputError(
                    f"{name} ({parent.checkpoint.location}) has no tensor {tensor.name!r}, which "
                    f"{assignment.method.name} needs; let a `passthrough` rule take it from the father"
                )
        if assignment.method.copies and inputs[0][1].by_name[tensor.name].dtype == tensor.dtype:
            return  # bit by bit, whatever the bits stand for
        for _, parent in [("father", self.father), *inputs]:
            _require_mergeable(parent, tensor.name, assignment.method.name)


def _cut(tensor: LogicalTensor, target: LogicalTensor) -> list[MergeUnit]:
    most = UNIT_BYTES * 8 // BITS_PER_ELEMENT[target.dtype]
    most -= most % CHUNK_ELEMENTS
    return [
        MergeUnit(tensor, target, first, min(most, target.elements - first))
        for first in range(0, max(target.elements, 1), most)
    ]


def _tied_head(father: ArchitectureMap) -> str | None:
    """The head's name, if the father stores it although it is tied to the embedding."""
    head, embedding = father.by_name.get(HEAD), father.by_name.get(EMBEDDING)
    if head is None or embedding is None or not father.ties_head:
        return None
    return HEAD if (head.shape, head.dtype) == (embedding.shape, embedding.dtype) else None


def _require_mergeable(parent: ArchitectureMap, name: str, method: str) -> None:
    tensor = parent.by_name[name]
    if tensor.dtype not in MERGEABLE_DTYPES:
        raise BadInputError(
            f"{parent.checkpoint.location}: tensor {tensor.stored!r} is {tensor.dtype}; {method} needs "
            f"one of {', '.join(MERGEABLE_DTYPES)}: dequantize the checkpoint, or let `passthrough` "
            "copy it from a parent that stores it as the father does"
        )


def _check_shapes(father: ArchitectureMap, other: ArchitectureMap) -> None:
    for tensor in other.tensors:
        own = father.by_name.get(tensor.name)
        if own is not None and own.shape != tensor.shape:
            raise BadInputError(
                f"tensor {tensor.name!r} has shape {list(own.shape)} in {father.checkpoint.location} "
                f"but {list(tensor.shape)} in {other.checkpoint.location}: the parents must be of one "
                "architecture and vocabulary"
            )
