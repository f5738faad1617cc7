"""The plan: the child's tensors, where each comes from, and how a recipe merges it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.errors import BadInputError
from workers.merging.methods import Grain, MergeMethod, get_method
from workers.merging.methods.method import Values
from workers.merging.parameters import parse_parameters, value_at, varies
from workers.merging.recipe import CARRIED, PostStep, Recipe, Rule
from workers.merging.selector import Selector

UNIT_BYTES = 32 << 20
"""A unit is at most this much of the child, whatever the size of a tensor; but for whole matrices."""

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at once: a few fp32 buffers of 1 MiB stay in a core's cache."""

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

NO_LINEAR_MAPS = ("embedding", "lm_head", "router", "norm")
"""Components whose two-dimensional tensors are tables, not maps between hidden states."""

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


@dataclass(frozen=True, slots=True)
class Assignment:
    """How one tensor is merged."""

    method: MergeMethod
    values: Values
    parents: tuple[str, ...]
    """Those that the method sees, in the recipe's order."""
    post: MergeMethod | None = None
    post_values: Values | None = None

    def grain(self, tensor: LogicalTensor) -> Grain:
        """What must be merged at once of `tensor`; what is no linear map needs no whole matrix."""
        grain = self.method.grain if self.post is None else self.post.grain
        return "row" if grain == "matrix" and not is_linear_map(tensor) else grain

    def uses_base(self, has_base: bool) -> bool:
        steps = [self.method, *([self.post] if self.post else [])]
        return has_base and any(step.uses_base != "never" for step in steps)


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
        self._selected: dict[Selector, frozenset[str]] = {}
        self._chosen: dict[tuple[Selector, ...], dict[str, int | None]] = {}
        self._checked: set[tuple[Any, ...]] = set()
        for other in [*maps.values(), *([base] if base else [])]:
            _check_shapes(self.father, other)

    def merged_as(self, target: LogicalTensor) -> LogicalTensor:
        """The tensor whose values go into `target`: itself, or the embedding for a tied head."""
        return self.father.by_name[EMBEDDING] if target.name == self.tied else target

    def source(self, name: str, tensor: LogicalTensor) -> LogicalTensor:
        """Where the values of `tensor` lie in a parent, or in the base."""
        parent = self.base if name == "base" else self.maps[name]
        assert parent is not None
        return parent.by_name[tensor.name]

    def units(self, target: LogicalTensor, grain: Grain) -> Iterator[MergeUnit]:
        """`target` cut into merge units, in order; one that is empty is one empty unit."""
        tensor = self.merged_as(target)
        most = target.elements
        if grain != "matrix":
            most = UNIT_BYTES * 8 // BITS_PER_ELEMENT[target.dtype]
            step = CHUNK_ELEMENTS if grain == "element" else columns_of(target)
            most = max(most - most % step, step)
        for first in range(0, max(target.elements, 1), max(most, 1)):
            yield MergeUnit(tensor, target, first, min(most, target.elements - first))

    def assign(self, recipe: Recipe) -> dict[str, Assignment]:
        """Logical name -> assignment, for every tensor that is merged.

        Raises `BadInputError` for a rule that cannot work, naming the tensor where it is about one.
        """
        parents = tuple(parent.name for parent in recipe.parents)
        carry = Assignment(get_method("passthrough"), {"source": parents[0]}, parents[:1])
        ways = [_RuleOnPlan(self, recipe, rule, parents) for rule in recipe.rules]
        chosen = self._choose(tuple(rule.where for rule in recipe.rules))
        assigned = {}
        for tensor in self.father.tensors:
            if tensor.name == self.tied:
                continue  # merged as the embedding
            number = chosen[tensor.name]
            way = carry if number is None else ways[number].assignment(tensor)
            self._check_inputs(tensor, way, recipe.base is not None)
            assigned[tensor.name] = way
        return assigned

    def _choose(self, selectors: tuple[Selector, ...]) -> dict[str, int | None]:
        """Logical name -> the number of the first rule that matches it."""
        if selectors not in self._chosen:
            selected = [self.select(where) for where in selectors]
            self._chosen[selectors] = {
                tensor.name: next(
                    (n for n, names in enumerate(selected) if tensor.name in names), None
                )
                for tensor in self.father.tensors
            }
        return self._chosen[selectors]

    def select(self, where: Selector) -> frozenset[str]:
        """The names of the tensors that `where` selects; none is a `BadInputError`."""
        if where not in self._selected:
            names = frozenset(t.name for t in self.father.tensors if where.matches(t))
            if not names:
                raise BadInputError(
                    f"recipe: the rule for {where} matches no tensor of {self.father.checkpoint.location}"
                )
            self._selected[where] = names
        return self._selected[where]

    def depth(self, tensor: LogicalTensor, where: Selector) -> float:
        """Where a tensor is between the first (0) and the last layer (1) of those that a rule is for.

        Embeddings are at 0; what else is outside all layers (final norm, head) is at 1.
        """
        if tensor.layer is None:
            return 0.0 if tensor.component == "embedding" else 1.0
        first, last = where.layers or (0, self.father.layers - 1)
        return (tensor.layer - first) / (last - first) if last > first else 0.0

    def _check_inputs(self, tensor: LogicalTensor, way: Assignment, has_base: bool) -> None:
        key = (tensor.name, way.method.copies, way.parents, uses_base := way.uses_base(has_base))
        if key in self._checked:
            return
        inputs = [(name, self.maps[name]) for name in way.parents]
        if uses_base and self.base is not None:
            inputs.append(("base", self.base))
        for name, parent in inputs:
            if tensor.name not in parent.by_name:
                raise BadInputError(
                    f"{name} ({parent.checkpoint.location}) has no tensor {tensor.name!r}, which "
                    f"{way.method.name} needs; let a `passthrough` rule take it from the father"
                )
        if not (way.method.copies and inputs[0][1].by_name[tensor.name].dtype == tensor.dtype):
            # Else it is copied bit by bit, whatever the bits stand for.
            for _, parent in [("father", self.father), *inputs]:
                _require_mergeable(parent, tensor.name, way.method.name)
        self._checked.add(key)


class _RuleOnPlan:
    """One rule of a recipe, its parameters worked out for each tensor that it is for."""

    def __init__(self, plan: Plan, recipe: Recipe, rule: Rule, parents: tuple[str, ...]) -> None:
        self._plan = plan
        self._where = rule.where
        self._parents = parents
        self._has_base = recipe.base is not None
        steps: list[Rule | PostStep] = [rule, *([rule.post] if rule.post else [])]
        self._steps = [
            (get_method(step.method), parse_parameters(step.parameters, f"method {step.method}"))
            for step in steps
        ]
        self._same: Assignment | None = None
        if not any(varies(parameters) for _, parameters in self._steps):
            self._same = self._assign([parameters for _, parameters in self._steps])

    def assignment(self, tensor: LogicalTensor) -> Assignment:
        if self._same is not None:
            return self._same
        depth = self._plan.depth(tensor, self._where)
        try:
            return self._assign([value_at(given, tensor, depth) for _, given in self._steps])
        except BadInputError as error:
            raise BadInputError(f"tensor {tensor.name!r}: {error}") from error

    def _assign(self, given: list[dict[str, Any]]) -> Assignment:
        values = [
            method.resolve(parameters, self._parents, self._has_base)
            for (method, _), parameters in zip(self._steps, given, strict=True)
        ]
        parents = (values[0]["source"],) if "source" in values[0] else self._parents
        way = Assignment(self._steps[0][0], values[0], parents)
        return (
            way if len(values) == 1 else replace(way, post=self._steps[1][0], post_values=values[1])
        )


def columns_of(tensor: LogicalTensor) -> int:
    """Elements of a row: of a vector all of them; a kernel's further dimensions count as columns."""
    return tensor.elements if len(tensor.shape) < 2 else tensor.elements // max(tensor.shape[0], 1)


def is_linear_map(tensor: LogicalTensor) -> bool:
    """Whether it is a weight `[out, in]` that maps hidden states to hidden states."""
    return (
        len(tensor.shape) == 2
        and min(tensor.shape) > 1
        and tensor.component not in (*NO_LINEAR_MAPS, *CARRIED)
    )


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
