"""The executor: runs recipes over opened parents, unit by unit, in fp32, with bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from workers.checkpoints import ArchitectureMap, Checkpoint, CheckpointReader, LogicalTensor
from workers.errors import BadInputError
from workers.merging.masks import keep_mask
from workers.merging.methods import Slice
from workers.merging.methods.method import Values
from workers.merging.plan import CHUNK_ELEMENTS, Assignment, MergeUnit, Plan
from workers.merging.recipe import ParentReference, Recipe
from workers.merging.sinks import Sink
from workers.merging.sources import TORCH_DTYPES, read_elements


@dataclass(slots=True)
class TensorReport:
    """What became of one logical tensor."""

    name: str
    component: str
    layer: int | None
    elements: int
    method: str
    parameters: Values
    changed: dict[str, int]
    """Per parent that has this tensor: how many elements of the child differ from it."""
    not_finite: int
    """Elements of the child that are NaN or infinite."""


class Merger:
    """Parents opened once, ready to run any number of recipes.

    `parents` by name, the father first. Not for use by several threads at once: a run brings its own
    threads. Raises `BadInputError` if the parents do not fit together.
    """

    def __init__(
        self,
        parents: dict[str, Checkpoint],
        base: Checkpoint | None = None,
        device: str = "cpu",
    ) -> None:
        self.parents = parents
        self.base = base
        self.device = torch.device(device)
        self.plan = Plan(
            {name: ArchitectureMap(parent) for name, parent in parents.items()},
            ArchitectureMap(base) if base else None,
        )
        self._readers = {name: CheckpointReader(parent) for name, parent in parents.items()}
        self._base_reader = CheckpointReader(base) if base else None
        self._statistics: dict[tuple[str, str], Any] = {}
        self._buffers = threading.local()

    @property
    def references(self) -> tuple[ParentReference, ...]:
        """The parents as recipes name them."""
        return tuple(ParentReference(name, p.fingerprint) for name, p in self.parents.items())

    @property
    def base_reference(self) -> ParentReference | None:
        return ParentReference("base", self.base.fingerprint) if self.base else None

    def run(self, recipe: Recipe, sink: Sink, threads: int = 1) -> None:
        """Merge every tensor that the sink wants and hand it over in the father's order.

        Memory: about `threads + 2` units of each parent. The result does not depend on `threads`.
        """
        for _ in self._run(recipe, sink, threads):
            pass

    def run_with_report(self, recipe: Recipe, sink: Sink, threads: int = 1) -> list[TensorReport]:
        """As `run`, and compare the child with every parent, element by element."""
        reports: list[TensorReport] = []
        assigned = self.plan.assign(recipe)
        for unit, values in self._run(recipe, sink, threads):
            tensor, way = unit.target, assigned[unit.tensor.name]
            if unit.first == 0:
                reports.append(
                    TensorReport(
                        tensor.name,
                        tensor.component,
                        tensor.layer,
                        tensor.elements,
                        way.method.name,
                        way.values,
                        dict.fromkeys(self._parents_with(tensor), 0),
                        0,
                    )
                )
            report = reports[-1]
            for name in report.changed:
                report.changed[name] += self._count_changes(name, unit, values)
            if values.is_floating_point():
                finite = _widened(values).isfinite()
                report.not_finite += finite.numel() - int(finite.sum())
        return reports

    def _run(
        self, recipe: Recipe, sink: Sink, threads: int
    ) -> Iterator[tuple[MergeUnit, torch.Tensor]]:
        self._check_parents(recipe)
        assigned = self.plan.assign(recipe)
        units = [unit for unit in self.plan.units if sink.wants(unit.target)]

        def work(unit: MergeUnit) -> torch.Tensor:
            values = sink.destination(unit, TORCH_DTYPES[unit.target.dtype])
            with torch.no_grad():
                self._merge_unit(unit, assigned[unit.tensor.name], recipe.seed, values)
            return values

        for unit, values in _in_order(work, units, threads):
            sink.accept(unit, values)
            yield unit, values

    def _check_parents(self, recipe: Recipe) -> None:
        if recipe.parents != self.references or recipe.base not in (None, self.base_reference):
            raise BadInputError(
                f"recipe {recipe.id[:12]} is for other parents than the opened ones: it names "
                f"{[(p.name, p.fingerprint[:12]) for p in recipe.parents]}, opened are "
                f"{[(p.name, p.fingerprint[:12]) for p in self.references]}"
            )

    def _merge_unit(
        self, unit: MergeUnit, way: Assignment, seed: int, values: torch.Tensor
    ) -> None:
        """Fill `values` with the merged elements of one unit."""
        names = [way.values["source"]] if way.method.copies else list(self.parents)
        stored = {name: self._read(name, unit.tensor, unit.first, unit.count) for name in names}
        father_dtype = TORCH_DTYPES[unit.tensor.dtype]
        if way.method.copies and stored[names[0]].dtype == father_dtype:
            values.copy_(stored[names[0]])
            return
        base = None
        if way.method.uses_base:
            base = self._read_base(unit.tensor, unit.first, unit.count)
        statistic = self._statistic(unit.tensor, way)
        for start in range(0, unit.count, CHUNK_ELEMENTS):
            stop = min(start + CHUNK_ELEMENTS, unit.count)
            parents32, base32, out = self._load(stored, base, start, stop)
            draw = partial(
                self._keep_mask, seed, unit.tensor.name, unit.first + start, stop - start
            )
            way.method.merge(Slice(parents32, base32, out, statistic, draw), way.values)
            # Through the father's dtype, also when a live model computes in another one: its
            # weights must be those that the written child would be loaded with.
            if values.dtype == father_dtype:
                values[start:stop].copy_(out)
            else:
                values[start:stop].copy_(out.to(father_dtype))

    def _load(
        self, stored: dict[str, torch.Tensor], base: torch.Tensor | None, start: int, stop: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
        """One chunk of parents, base and an output, as fp32 in this thread's reused buffers."""
        wanted = len(stored) + 2
        buffers = getattr(self._buffers, "tensors", [])
        while len(buffers) < wanted:
            buffers.append(torch.empty(CHUNK_ELEMENTS, dtype=torch.float32, device=self.device))
        self._buffers.tensors = buffers
        chunks = [buffer[: stop - start] for buffer in buffers[:wanted]]
        parents = {
            name: chunk.copy_(values[start:stop])
            for (name, values), chunk in zip(stored.items(), chunks[2:], strict=True)
        }
        base_chunk = chunks[1].copy_(base[start:stop]) if base is not None else None
        return parents, base_chunk, chunks[0]

    def _statistic(self, tensor: LogicalTensor, way: Assignment) -> Any:
        """What the method must know of the whole tensor, computed once for all recipes."""
        if way.method.statistic is None:
            return None
        key = (tensor.name, way.method.statistic.__name__)
        if key not in self._statistics:
            statistic = way.method.statistic()
            for first in range(0, tensor.elements, CHUNK_ELEMENTS):
                count = min(CHUNK_ELEMENTS, tensor.elements - first)
                stored = {name: self._read(name, tensor, first, count) for name in self.parents}
                base = self._read_base(tensor, first, count) if way.method.uses_base else None
                parents32, base32, _ = self._load(stored, base, 0, count)
                statistic.update(parents32, base32)
            self._statistics[key] = statistic.finish()
        return self._statistics[key]

    def _read(self, parent: str, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        own = self.plan.maps[parent].by_name[tensor.name]
        return read_elements(self._readers[parent], own, first, count)

    def _read_base(self, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor:
        assert self._base_reader is not None and self.plan.base is not None
        return read_elements(self._base_reader, self.plan.base.by_name[tensor.name], first, count)

    def _keep_mask(
        self, seed: int, tensor: str, start: int, count: int, parent: str, probability: float
    ) -> torch.Tensor:
        mask = keep_mask(seed, parent, tensor, start, count, probability)
        return torch.from_numpy(mask.view("u1")).to(self.device).float()

    def _parents_with(self, tensor: LogicalTensor) -> list[str]:
        return [name for name, parent in self.plan.maps.items() if tensor.name in parent.by_name]

    def _count_changes(self, parent: str, unit: MergeUnit, values: torch.Tensor) -> int:
        own = self._read(parent, unit.target, unit.first, unit.count).to(values.dtype)
        return int((own != values).sum())


def _widened(values: torch.Tensor) -> torch.Tensor:
    """The same values in a dtype that torch can do everything with."""
    return values if values.dtype == torch.float64 else values.float()


def _in_order(work: Any, units: list[MergeUnit], threads: int) -> Iterator[tuple[MergeUnit, Any]]:
    """(unit, work(unit)) in the order of `units`, with a few units under way at once."""
    if threads == 1:
        for unit in units:
            yield unit, work(unit)
        return
    waiting: deque[tuple[MergeUnit, Future[Any]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for unit in units:
                waiting.append((unit, pool.submit(work, unit)))
                if len(waiting) > threads + 1:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
