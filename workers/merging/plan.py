"""The plan: the child's tensors, where each comes from, and how a recipe merges it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.checkpoints.layout import Form, child_layout
from workers.checkpoints.names import EMBEDDING, HEAD, TOKEN_TABLE
from workers.checkpoints.quantization import check_values_readable
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.checkpoints.vocabulary import ChildVocabulary, child_vocabulary, is_token_indexed
from workers.errors import BadInputError
from workers.merging.as_experts import with_rows
from workers.merging.assignment import Assignment as Assignment
from workers.merging.assignment import RuleOnPlan, carried
from workers.merging.assignment import is_linear_map as is_linear_map
from workers.merging.expert_order import ExpertPlaces
from workers.merging.left_out import LeftOut, check_recognised, unknown_warnings
from workers.merging.methods import Grain
from workers.merging.methods.as_experts import AS_EXPERTS
from workers.merging.recipe import Recipe
from workers.merging.selector import Selector, parse_selector

UNIT_BYTES = 32 << 20
"""A unit is at most this much of the child, whatever the size of a tensor; but for whole matrices."""

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at once: a few fp32 buffers of 1 MiB stay in a core's cache."""

BASE = "base"
"""What the base is called beside the parents; no parent may have this name."""

RECENT_CHOICES = 16
"""Of so many lists of selectors a plan remembers which rule each tensor takes: candidates of one search
mostly share theirs."""

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


class Plan:
    """The tensors of children of one form, cut into merge units; recipes are assigned to it again and again.

    `maps` are the architecture maps of the parents by name, the father first, and `base` that of the
    base. Raises `BadInputError` if tensors of the same name differ in shape.
    """

    def __init__(
        self,
        maps: dict[str, ArchitectureMap],
        base: ArchitectureMap | None,
        form: Form = Form(),  # noqa: B008 - immutable
    ) -> None:
        self.maps = maps
        self.base = base
        self.form = form
        self.father = next(iter(maps.values()))
        self.vocabulary = self._choose_vocabulary()
        self.layout = child_layout(maps, form, self.vocabulary)
        self.child = self.father if self.layout.is_fathers else ArchitectureMap(self.layout)
        self.tied = _tied_head(self.child)
        if form.experts and form.layers:
            raise BadInputError(
                "experts: cannot be ordered where layers are stacked anew: write the child of the one, then "
                "merge it with the other"
            )
        self.experts = ExpertPlaces(form.experts, self.child, maps | ({BASE: base} if base else {}))
        self._slices = _slices_by_layer(form)
        self._selected: dict[Selector, frozenset[str]] = {}
        self._left_out = LeftOut(self.child)
        self._unmatched: dict[Selector, str | None] = {}
        self._chosen: dict[tuple[Selector, ...], dict[str, int]] = {}
        self._checked: set[tuple[Any, ...]] = set()
        for other in [*maps.values(), *([base] if base else [])]:
            check_values_readable(other.checkpoint)
        if not form.layers:
            for name, other in [*maps.items(), *([(BASE, base)] if base else [])]:
                for tensor in self.child.tensors:
                    if tensor.name in other.by_name:
                        self._check_shape(name, tensor)

    def _choose_vocabulary(self) -> ChildVocabulary | None:
        if self.form.vocabulary is None:
            return None
        # Maps of parents are of checkpoints; only the child's is of a layout.
        checkpoints = {name: cast(Checkpoint, p.checkpoint) for name, p in self.maps.items()}
        base = cast(Checkpoint, self.base.checkpoint) if self.base else None
        return child_vocabulary(checkpoints, base, self.form.vocabulary)

    def warnings(self, recipe: Recipe) -> list[str]:
        """What the user should know of the child: of its vocabulary, and of what its rules did not know."""
        found = list(self.vocabulary.warnings) if self.vocabulary else []
        chosen = self._choose(tuple(rule.where for rule in recipe.rules))
        if recipe.rules:
            found += unknown_warnings(self.child, self.father.location, chosen)
        unused = set(range(len(recipe.rules))) - set(chosen.values())
        found += [
            f"the rule for where: {rule.where} ({rule.method}) is never used: rules before it are for all of "
            "its tensors, and the first that matches counts"
            for number, rule in enumerate(recipe.rules)
            if number in unused
        ]
        return found

    def has_mapped_rows(self, tensor: LogicalTensor) -> bool:
        """Whether the tensor's rows are those of tokens, which each parent may have at another place."""
        return self.vocabulary is not None and is_token_indexed(tensor.name)

    def merged_as(self, target: LogicalTensor) -> LogicalTensor:
        """The tensor whose values go into `target`: itself, or the embedding for a tied head."""
        return self.child.by_name[EMBEDDING] if target.name == self.tied else target

    def source(self, name: str, tensor: LogicalTensor) -> LogicalTensor | None:
        """Where the values of the child's `tensor` lie in a parent, or in the base; None if it has none."""
        parent = self._input(name)
        if tensor.layer is None or not self._slices:
            return parent.find(self.experts.counterpart(name, tensor))
        part, offset = self._slices[tensor.layer]
        first, _ = part.get(name, next(iter(part.values())) if name == BASE else (-1, -1))
        if first < 0:
            return None
        rest = tensor.name.removeprefix(f"layers.{tensor.layer}.")
        return parent.by_name.get(f"layers.{first + offset}.{rest}")

    def parents_of(self, tensor: LogicalTensor, parents: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `parents` that a tensor is merged of: with stacked layers, those of its slice.

        Embeddings go with the first slice, what is behind the layers with the last.
        """
        if not self._slices:
            return parents
        layer = tensor.layer
        if layer is None:
            layer = 0 if tensor.component == "embedding" else len(self._slices) - 1
        part, _ = self._slices[layer]
        return tuple(name for name in parents if name in part)

    def units(self, target: LogicalTensor, grain: Grain) -> Iterator[MergeUnit]:
        """`target` cut into merge units, in order; one that is empty is one empty unit."""
        tensor = self.merged_as(target)
        most = target.elements
        if grain != "matrix":
            most = UNIT_BYTES * 8 // BITS_PER_ELEMENT[target.dtype]
            step = CHUNK_ELEMENTS if grain == "element" else max(columns_of(target), 1)
            most = max(most - most % step, step)
        for first in range(0, max(target.elements, 1), max(most, 1)):
            yield MergeUnit(tensor, target, first, min(most, target.elements - first))

    def assign(self, recipe: Recipe) -> dict[str, Assignment]:
        """Logical name -> assignment, for every tensor that is merged.

        Raises `BadInputError` for a rule that cannot work, naming the tensor where it is about one.
        """
        parents = tuple(parent.name for parent in recipe.parents)
        if recipe.rules:
            selectors = [rule.where for rule in recipe.rules]
            check_recognised(self.child, self.father.location, selectors)
        ways = [RuleOnPlan(self, recipe, rule) for rule in recipe.rules]
        chosen = self._choose(tuple(rule.where for rule in recipe.rules))
        assigned: dict[str, Assignment] = {}
        as_experts, of_all = [], []
        for tensor in self.child.tensors:
            if tensor.name == self.tied:
                continue  # merged as the embedding
            present = self.parents_of(tensor, parents)
            number = chosen.get(tensor.name)
            if number is None:
                way = carried(tensor, parents, present)
            else:
                way = ways[number].assignment(tensor, self.parents_of(tensor, ways[number].parents))
                if way.method is AS_EXPERTS and self.experts.is_of_all(tensor):
                    of_all.append((tensor, way))
                    way = carried(tensor, parents, present)
                if TOKEN_TABLE.search(tensor.name) and not way.copies:
                    way = carried(tensor, parents, present)
            assigned[tensor.name] = way
            if way.method is AS_EXPERTS:
                as_experts.append(tensor)
            else:
                self._check_inputs(tensor, way, recipe.base is not None)
        followed = {tensor.layer for tensor in as_experts}
        for tensor, way in of_all:
            if (
                tensor.layer not in followed
            ):  # nothing of this layer's router would follow its experts
                with_rows(tensor, way, self.experts, assigned)
        for tensor in as_experts:
            way = with_rows(tensor, assigned[tensor.name], self.experts, assigned)
            assigned[tensor.name] = way
            for row in {id(row): row for row in way.rows}.values():
                self._check_inputs(tensor, row, recipe.base is not None)
        return assigned

    def _choose(self, selectors: tuple[Selector, ...]) -> dict[str, int]:
        """Logical name -> the number of the first rule that matches it, if one does."""
        if selectors not in self._chosen:
            chosen: dict[str, int] = {}
            for number, where in enumerate(selectors):
                for name in self.select(where):
                    chosen.setdefault(name, number)
            while len(self._chosen) >= RECENT_CHOICES:
                del self._chosen[next(iter(self._chosen))]
            self._chosen[selectors] = chosen
        return self._chosen[selectors]

    def select(self, where: Selector) -> frozenset[str]:
        """The names of the tensors that `where` selects; none is a `BadInputError`."""
        if where in self._selected:
            return self._selected[where]
        where.check_experts(self.child.layers, self.child.experts, self.layout.location)
        if where.is_by_name:
            # A rule for each tensor must not cost a look at every tensor.
            found = (tensor for name in where.names for tensor in self._by_any_name.get(name, ()))
            names = frozenset(t.name for t in found if where.matches_place(t))
        elif where.is_by_place:
            places = where.each_place(self.child.layers, self.child.experts)
            found = (tensor for place in places for tensor in self._by_place.get(place, ()))
            rest = replace(where, places=())
            names = frozenset(t.name for t in found if rest.matches(t))
        else:
            names = frozenset(t.name for t in self.child.tensors if where.matches(t))
        if not names:
            raise BadInputError(
                f"recipe: the rule for where: {where} matches no tensor of {self.layout.location}"
            )
        if not where.is_by_name and not where.is_by_place:
            self._selected[where] = names  # others differ from candidate to candidate of a search
        return names

    def unmatched_key(self, where: Selector) -> str | None:
        """The key of a case's selector that matches no tensor on its own; None if each matches some.

        Together they may match nothing, and names may be the father's where the child has not his layers:
        mergekit's gradients and filters, which need not match, become such cases.
        """
        if where not in self._unmatched:
            self._unmatched[where] = None
            for key, value in where.to_dict().items():
                alone = parse_selector({key: value})
                maps = (self.child, self.father) if key == "names" else (self.child,)
                if not any(alone.matches(tensor) for found in maps for tensor in found.tensors):
                    self._unmatched[where] = key
                    break
        return self._unmatched[where]

    @cached_property
    def _by_any_name(self) -> dict[str, list[LogicalTensor]]:
        """Tensors by their canonical names and by their stored ones, as selectors know both."""
        found: dict[str, list[LogicalTensor]] = {}
        for tensor in self.child.tensors:
            for name in {tensor.name, tensor.stored}:
                found.setdefault(name, []).append(tensor)
        return found

    @cached_property
    def _by_place(self) -> dict[tuple[int, int], list[LogicalTensor]]:
        """Tensors of routed experts by their layer and expert."""
        found: dict[tuple[int, int], list[LogicalTensor]] = {}
        for tensor in self.child.tensors:
            if tensor.layer is not None and tensor.expert is not None:
                found.setdefault((tensor.layer, tensor.expert), []).append(tensor)
        return found

    def depth(self, tensor: LogicalTensor, where: Selector) -> float:
        """Where a tensor is between the first (0) and the last layer (1) of those that a rule is for.

        Embeddings are at 0; what else is outside all layers (final norm, head) is at 1.
        """
        if tensor.layer is None:
            return 0.0 if tensor.component == "embedding" else 1.0
        first, last = where.layers or (0, self.child.layers - 1)
        last = min(last, self.child.layers - 1)
        return (tensor.layer - first) / (last - first) if last > first else 0.0

    def _check_inputs(self, tensor: LogicalTensor, way: Assignment, has_base: bool) -> None:
        key = (tensor.name, way.copies, way.parents, uses_base := way.uses_base(has_base))
        if key in self._checked:
            return
        inputs = [*way.parents, *([BASE] if uses_base else [])]
        for name in inputs:
            if self.source(name, tensor) is None:
                raise BadInputError(
                    f"{self._where(name)} has no tensor {tensor.name!r}, which {way.method.name} needs; "
                    "let a `passthrough` rule take it from the father"
                )
            self._check_shape(name, tensor)
            if not self.form.layers:  # else the recipe says itself which of them are wanted
                self._left_out.check(name, self._input(name), tensor)
        own = self.source(inputs[0], tensor)
        if not (way.copies and own is not None and own.values_dtype == tensor.dtype):
            # Else it is copied bit by bit, whatever the bits stand for.
            for name in inputs:
                found = self.source(name, tensor)
                assert found is not None
                _require_mergeable(found.values_dtype, found, self._where(name), way.method.name)
            _require_mergeable(tensor.dtype, tensor, self.layout.location, way.method.name)
        self._checked.add(key)

    def _input(self, name: str) -> ArchitectureMap:
        parent = self.base if name == BASE else self.maps[name]
        assert parent is not None
        return parent

    def _where(self, name: str) -> str:
        return f"{name} ({self._input(name).location})"

    def _check_shape(self, name: str, tensor: LogicalTensor) -> None:
        own = self.source(name, tensor)
        if own is None:
            return
        first = 1 if self.has_mapped_rows(tensor) else 0
        if own.shape[first:] != tensor.shape[first:]:
            raise BadInputError(
                f"tensor {tensor.name!r} has shape {list(tensor.shape)} in {self.layout.location} but "
                f"{list(own.shape)} in {self._where(name)}: the parents must be of one architecture; if they "
                "differ in their tokens alone, say whose the child has (vocabulary; in mergekit's files "
                "tokenizer_source)"
            )


def form_of(recipe: Recipe) -> Form:
    """What makes the child's layout differ from its father's, and the order of the parents' experts."""
    return Form(recipe.layers, recipe.dtype, recipe.shard_bytes, recipe.vocabulary, recipe.experts)


def _slices_by_layer(form: Form) -> list[tuple[dict[str, tuple[int, int]], int]]:
    """For each of the child's stacked layers its slice, and the number of the layer in it."""
    found = []
    for part in form.layers:
        first, last = next(iter(part.values()))
        found += [(part, offset) for offset in range(last - first + 1)]
    return found


def columns_of(tensor: LogicalTensor) -> int:
    """Elements of a row: of a vector all of them; a kernel's further dimensions count as columns."""
    return tensor.elements if len(tensor.shape) < 2 else tensor.elements // max(tensor.shape[0], 1)


def is_transposed(tensor: LogicalTensor) -> bool:
    """Whether a linear map is stored `[in, out]`."""
    return tensor.name.endswith("_transposed.weight")


def _tied_head(father: ArchitectureMap) -> str | None:
    """The head's name, if the child stores it although it is tied to the embedding."""
    head, embedding = father.by_name.get(HEAD), father.by_name.get(EMBEDDING)
    if head is None or embedding is None or not father.ties_head:
        return None
    return HEAD if (head.shape, head.dtype) == (embedding.shape, embedding.dtype) else None


def _require_mergeable(dtype: str, tensor: LogicalTensor, where: str, method: str) -> None:
    if dtype not in MERGEABLE_DTYPES:
        raise BadInputError(
            f"{where}: tensor {tensor.stored!r} is {tensor.dtype}; {method} needs one of "
            f"{', '.join(MERGEABLE_DTYPES)}: dequantize the checkpoint, or let `passthrough` copy it "
            "from a parent that stores it as the father does"
        )
