"""The executor: fills any stretch of any tensor of a recipe's child, in fp32, with bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch

from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.checkpoints.layout import Form
from workers.errors import BadInputError
from workers.merging.buffers import Buffers
from workers.merging.masks import keep_mask
from workers.merging.methods import Grain, MergeMethod, Slice, Statistic
from workers.merging.methods.method import Values
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
        self.statistics = StatisticCache(None if keep_statistics else RECENT_STATISTICS)
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
        plan = self.plan if form == self.plan.form else Plan(self._maps, self._base_map, form)
        return Run(self, recipe, plan)

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

    def __init__(self, merger: Merger, recipe: Recipe, plan: Plan) -> None:
        self.merger = merger
        self.recipe = recipe
        self.plan = plan
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
        tensor, way = unit.tensor, self.assigned[unit.tensor.name]
        father_dtype = TORCH_DTYPES[unit.target.dtype]
        if way.copies:
            stored = self.read(way.parents[0], tensor, unit.first, unit.count)
            if stored.dtype == father_dtype:
                values.copy_(stored)
                return
        for first, count, piece in self._slices(tensor, way, unit.first, unit.count):
            way.method.merge(piece, way.values)
            if way.post is not None:
                assert way.post_values is not None
                self._reload(piece, tensor, first, count)
                way.post.merge(piece, way.post_values)
            merged = piece.out.reshape(-1)
            # Rows may reach beyond the unit.
            begin, end = max(first, unit.first), min(first + count, unit.first + unit.count)
            merged = merged[begin - first : end - first]
            # Through the father's dtype, also when a live model computes in another one: its
            # weights must be those that the written child would be loaded with.
            if values.dtype != father_dtype:
                merged = merged.to(father_dtype)
            values[begin - unit.first : end - unit.first].copy_(merged)

    def _slices(
        self, tensor: LogicalTensor, way: Assignment, first: int, count: int
    ) -> Iterable[tuple[int, int, Slice]]:
        """(first element, elements, slice) of what the method must see to merge a unit."""
        statistic = self._statistic(tensor, way)
        self._hold(tensor, way, first, count)
        for start, size, shape in _cut(tensor, way.grain(tensor), first, count, CHUNK_ELEMENTS):
            yield start, size, self._load(tensor, way, start, size, shape, statistic)

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

    def _statistic(self, tensor: LogicalTensor, way: Assignment) -> Any:
        """What the method must know of the whole tensor."""
        method, values = way.method, way.values
        if method.statistic is None or method.statistic(values) is None:
            return None
        uses_base = way.uses_base(self.recipe.base is not None)
        key: tuple[Any, ...] = (tensor.name, method.statistic, way.parents, uses_base)
        cache = self._own_statistics
        if method.statistic_parameters:
            key = (*key, *(repr(values[name]) for name in method.statistic_parameters))
        elif self.plan is self.merger.plan:  # in another form a name may stand for other tensors
            cache = self.merger.statistics
        scan = cache.get(key, lambda: self._new_scan(tensor, way, method, values))
        try:
            return scan.result()
        except BaseException:
            cache.forget(key)
            raise

    def _new_scan(
        self, tensor: LogicalTensor, way: Assignment, method: MergeMethod, values: Values
    ) -> SharedScan:
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
            self._hold(tensor, way, first, count)
            for start, size, shape in _cut(tensor, grain, first, count, STATISTIC_CHUNK_ELEMENTS):
                statistic.update(self._load(tensor, way, start, size, shape, None))
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
        return self.merger.sources[name].read(own, first, count)

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


def _cut(
    tensor: LogicalTensor, grain: Grain, first: int, count: int, most: int
) -> Iterable[tuple[int, int, tuple[int, ...]]]:
    """(first element, elements, shape) of the slices that cover a stretch of a tensor."""
    if grain == "element":
        for start in range(first, first + count, most):
            size = min(most, first + count - start)
            yield start, size, (size,)
        return
    columns = columns_of(tensor)
    if not count or not columns:
        return
    step = columns * (tensor.elements // columns if grain == "matrix" else max(most // columns, 1))
    last = -(-(first + count) // columns) * columns
    for start in range(0 if grain == "matrix" else first - first % columns, last, step):
        size = min(step, last - start)
        yield start, size, (size // columns, columns)


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> None:
    """`work(item)` for every item, by so many threads; the first error ends it."""
    if threads == 1:
        for item in items:
            work(item)
        return
    remaining = iter(items)
    lock = threading.Lock()
    stopped = threading.Event()

    def loop() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    item = next(remaining, stopped)
                if item is stopped:
                    return
                work(item)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(loop) for _ in range(threads)]:
                future.result()
        finally:
            stopped.set()  # an interrupt arrives here, not in the threads
