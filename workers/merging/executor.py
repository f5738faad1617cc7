"""The executor: fills any stretch of any tensor of a recipe's child, in fp32, with bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch

from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.checkpoints.layout import Form
from workers.errors import BadInputError
from workers.merging.buffers import Buffers
from workers.merging.expert_rows import read_matched
from workers.merging.masks import keep_mask
from workers.merging.methods import MergeMethod, Slice, Statistic
from workers.merging.methods.method import Values
from workers.merging.pieces import Piece, cut, cut_rows
from workers.merging.plan import (
    BASE,
    CHUNK_ELEMENTS,
    Assignment,
    MergeUnit,
    Plan,
    columns_of,
    form_of,
    is_linear_map,
    is_transposed,
)
from workers.merging.recipe import ParentReference, Recipe
from workers.merging.sources import TORCH_DTYPES, Source
from workers.merging.statistics import (
    STATISTIC_CHUNK_ELEMENTS,
    STRETCH_ELEMENTS,
    SharedScan,
    StatisticCache,
)
from workers.merging.threads import in_threads
from workers.merging.token_rows import TokenRows

RECENT_STATISTICS = 64


class Merger:
    """Parents opened once, ready to run any number of recipes.

    `parents` by name, the father first. `keep_statistics`: for searches, which need the same ones again
    for each candidate; else only recent ones are kept. `form`: that of the recipes to come, since parents may
    fit together in no other one. Not for use by several threads at once: a run brings its own threads.
    Raises `BadInputError` if the parents do not fit together.
    """

    def __init__(
        self,
        parents: dict[str, Checkpoint],
        base: Checkpoint | None = None,
        device: str = "cpu",
        keep_statistics: bool = False,
        form: Form = Form(),  # noqa: B008 - immutable
    ) -> None:
        self.parents = parents
        self.base = base
        self.device = torch.device(device)
        self._maps = {name: ArchitectureMap.of(parent) for name, parent in parents.items()}
        self._base_map = ArchitectureMap.of(base) if base else None
        self.plan = Plan(self._maps, self._base_map, form)
        self.sources = {name: Source(parent) for name, parent in parents.items()}
        if base is not None:
            self.sources[BASE] = Source(base)
        self._most_statistics = None if keep_statistics else RECENT_STATISTICS
        self.statistics = StatisticCache(self._most_statistics)
        self._other: tuple[Plan, StatisticCache] | None = None
        self.buffers = Buffers(self.device)

    @property
    def references(self) -> tuple[ParentReference, ...]:
        """The parents as recipes name them."""
        return tuple(ParentReference(name, p.fingerprint) for name, p in self.parents.items())

    @property
    def base_reference(self) -> ParentReference | None:
        return ParentReference(BASE, self.base.fingerprint) if self.base else None

    def start(self, recipe: Recipe) -> Run:
        """Check the recipe and assign it to the plan; nothing is read yet."""
        if recipe.parents != self.references or recipe.base not in (None, self.base_reference):
            raise BadInputError(
                f"recipe {recipe.id[:12]} is for other parents than the opened ones: it names "
                f"{[(p.name, p.fingerprint[:12]) for p in recipe.parents]}, opened are "
                f"{[(p.name, p.fingerprint[:12]) for p in self.references]}"
            )
        form = form_of(recipe)
        if form == self.plan.form:
            return Run(self, recipe, self.plan, self.statistics)
        if self._other is None or self._other[0].form != form:
            # What was found of one form of child is not for another: names stand for other tensors.
            plan = Plan(self._maps, self._base_map, form)
            self._other = plan, StatisticCache(self._most_statistics)
        return Run(self, recipe, *self._other)

    def realize(self, recipe: Recipe, views: dict[str, torch.Tensor], threads: int = 1) -> None:
        """Write the child's values into flat `views`, by logical name; others are not merged.

        A view of another dtype than the child's gets the child's values all the same: they are rounded
        to the father's dtype first, as those of a written child are. The result does not depend on
        `threads`.
        """
        run = self.start(recipe)
        tensors = [tensor for tensor in run.plan.child.tensors if tensor.name in views]
        units = (unit for tensor in tensors for unit in run.units(tensor))
        in_threads(
            lambda unit: run.fill(
                unit, views[unit.target.name][unit.first : unit.first + unit.count]
            ),
            units,
            threads,
        )


class Run:
    """One recipe over a merger's parents. Its methods are safe to be called by many threads."""

    def __init__(
        self, merger: Merger, recipe: Recipe, plan: Plan, statistics: StatisticCache
    ) -> None:
        self.merger = merger
        self.recipe = recipe
        self.plan = plan
        self._statistics = statistics
        self.assigned = self.plan.assign(recipe)
        self._own_statistics = StatisticCache(RECENT_STATISTICS)
        self._token_rows: dict[str, TokenRows] = {}
        self._lock = threading.Lock()
        self._held = threading.local()

    def way(self, target: LogicalTensor) -> Assignment:
        """How the values of `target` are made."""
        return self.assigned[self.plan.merged_as(target).name]

    def units(self, target: LogicalTensor) -> Iterable[MergeUnit]:
        return self.plan.units(target, self.way(target).grain(target))

    @torch.no_grad()
    def fill(self, unit: MergeUnit, values: torch.Tensor) -> None:
        """Fill the flat `values` `[unit.count]` with the merged elements of one unit."""
        way = self.assigned[unit.tensor.name]
        if not way.rows:
            self._fill(Piece(unit.tensor, way, unit.first, unit.count), values, unit.target.dtype)
            return
        self._hold(unit.tensor, way, unit.first, unit.count)
        for piece in cut_rows(unit, way):
            begin = piece.start + piece.first - unit.first
            self._fill(piece, values[begin : begin + piece.count], unit.target.dtype)

    def _fill(self, whole: Piece, values: torch.Tensor, dtype: str) -> None:
        tensor, way, first, count = whole.tensor, whole.way, whole.first, whole.count
        father_dtype = TORCH_DTYPES[dtype]
        if way.copies:
            stored = self.read(way.parents[0], tensor, whole.start + first, count)
            if stored.dtype == father_dtype:
                values.copy_(stored)
                return
        for start, size, piece in self._slices(whole):
            way.method.merge(piece, way.values)
            if way.post is not None:
                assert way.post_values is not None
                self._reload(piece, tensor, whole.start + start, size)
                way.post.merge(piece, way.post_values)
            merged = piece.out.reshape(-1)
            # Rows may reach beyond the unit.
            begin, end = max(start, first), min(start + size, first + count)
            merged = merged[begin - start : end - start]
            # Through the father's dtype, also when a live model computes in another one: its
            # weights must be those that the written child would be loaded with.
            if values.dtype != father_dtype:
                merged = merged.to(father_dtype)
            values[begin - first : end - first].copy_(merged)

    def _slices(self, whole: Piece) -> Iterable[tuple[int, int, Slice]]:
        """(first element, elements, slice) of what the method must see to merge a piece."""
        tensor, way = whole.tensor, whole.way
        statistic = self._statistic(whole)
        if not whole.is_row:  # all rows of the unit are held already
            self._hold(tensor, way, whole.first, whole.count)
        grain = way.grain(tensor)
        for start, size, shape in cut(tensor, grain, whole.first, whole.count, CHUNK_ELEMENTS):
            yield start, size, self._load(tensor, way, whole.start + start, size, shape, statistic)

    def _load(
        self,
        tensor: LogicalTensor,
        way: Assignment,
        first: int,
        count: int,
        shape: tuple[int, ...],
        statistic: Any,
    ) -> Slice:
        """Parents, base and an output as fp32 in this thread's reused buffers."""
        names = self._inputs(way)
        uses_base = BASE in names
        buffers = self.merger.buffers.take(
            len(names) + 1, count, keep=way.grain(tensor) != "matrix"
        )
        for name, buffer in zip(names, buffers[1:], strict=True):
            buffer.copy_(self.read(name, tensor, first, count))
        loaded = [buffer.view(shape) for buffer in buffers]
        return Slice(
            parents=dict(zip(way.parents, loaded[1:], strict=False)),
            base=loaded[-1] if uses_base else None,
            out=loaded[0],
            statistic=statistic,
            keep_mask=partial(self._keep_mask, tensor.name, first, shape),
            scratch=partial(self.merger.buffers.scratch, shape),
            is_matrix=is_linear_map(tensor),
            is_transposed=is_transposed(tensor),
        )

    def _reload(self, piece: Slice, tensor: LogicalTensor, first: int, count: int) -> None:
        """Give the post-step the parents as they are: the method may have overwritten them."""
        for name, values in piece.parents.items():
            values.view(-1).copy_(self.read(name, tensor, first, count))

    def _statistic(self, whole: Piece) -> Any:
        """What the method must know of the whole tensor, or row."""
        tensor, way = whole.tensor, whole.way
        method, values = way.method, way.values
        if method.statistic is None or method.statistic(values) is None:
            return None
        uses_base = way.uses_base(self.recipe.base is not None)
        key: tuple[Any, ...] = (
            tensor.name,
            whole.start,
            method.statistic,
            way.parents,
            uses_base,
        )
        cache = self._own_statistics
        if method.statistic_parameters:
            key = (*key, *(repr(values[name]) for name in method.statistic_parameters))
        elif not whole.is_row:  # rows are many, and soon scanned again
            cache = self._statistics
        scan = cache.get(key, lambda: self._new_scan(whole, method, values))
        try:
            return scan.result()
        except BaseException:
            cache.forget(key)
            raise

    def _new_scan(self, whole: Piece, method: MergeMethod, values: Values) -> SharedScan:
        tensor, way, offset = whole.tensor, whole.way, whole.start
        make: Any = method.statistic
        grain = method.statistic_grain
        step = STRETCH_ELEMENTS
        if grain == "row":
            columns = max(columns_of(tensor), 1)
            step = max(step - step % columns, columns)

        def scan(stretch: int) -> Statistic:
            statistic: Statistic = make(values)
            first = stretch * step
            count = min(step, tensor.elements - first)
            if not whole.is_row:
                self._hold(tensor, way, first, count)
            for start, size, shape in cut(tensor, grain, first, count, STATISTIC_CHUNK_ELEMENTS):
                statistic.update(self._load(tensor, way, offset + start, size, shape, None))
            return statistic

        return SharedScan(max(1, -(-tensor.elements // step)), scan)

    def _inputs(self, way: Assignment) -> list[str]:
        """Parents, and the base if it is used."""
        return [*way.parents, *([BASE] if way.uses_base(self.recipe.base is not None) else [])]

    def _hold(self, tensor: LogicalTensor, way: Assignment, first: int, count: int) -> None:
        """Read from remote stores at once what this thread will work on chunk by chunk."""
        self._held.values = held = {}
        for name in self._inputs(way):
            if self.merger.sources[name].is_remote:
                held[name] = tensor.name, first, self._read(name, tensor, first, count)

    def read(self, name: str, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        """Elements of the child's `tensor` as a parent, or the base, has them: flat, in its dtype."""
        held = getattr(self._held, "values", {}).get(name)
        if held is not None:
            held_tensor, begin, values = held
            if held_tensor == tensor.name and begin <= first <= first + count <= begin + len(
                values
            ):
                return cast(torch.Tensor, values[first - begin : first - begin + count])
        return self._read(name, tensor, first, count)

    def _read(self, name: str, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        if self.plan.has_mapped_rows(tensor):
            return self._rows_of(tensor).read(name, first, count)
        own = self.plan.source(name, tensor)
        assert own is not None, tensor.name
        rows = self.plan.experts.rows(name, tensor)
        return read_matched(self.merger.sources[name], own, rows, first, count)

    def _rows_of(self, tensor: LogicalTensor) -> TokenRows:
        with self._lock:
            if tensor.name not in self._token_rows:
                assert self.plan.vocabulary is not None
                found = {name: self.plan.source(name, tensor) for name in self.merger.sources}
                self._token_rows[tensor.name] = TokenRows(
                    self.plan.vocabulary,
                    self.merger.sources,
                    {name: own for name, own in found.items() if own is not None},
                )
            return self._token_rows[tensor.name]

    def _keep_mask(
        self,
        tensor: str,
        start: int,
        shape: tuple[int, ...],
        parent: str,
        probability: float | torch.Tensor,
    ) -> torch.Tensor:
        count = torch.Size(shape).numel()
        wanted: Any = probability
        if isinstance(probability, torch.Tensor):
            wanted = probability.reshape(-1).cpu().numpy()
        mask = keep_mask(self.recipe.seed, parent, tensor, start, count, wanted)
        kept = torch.from_numpy(mask.view("u1")).view(shape)
        return self.merger.buffers.mask(shape).copy_(kept)
