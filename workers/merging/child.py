"""Write a child's weights into a store and prove that they lie there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from workers.checkpoints import CheckpointWriter, LogicalTensor
from workers.checkpoints.verify import verify_weights
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.executor import Merger, Run
from workers.merging.methods.method import Values
from workers.merging.sources import TORCH_DTYPES
from workers.storage import Store


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


@dataclass(frozen=True)
class ChildReport:
    """What a written child consists of."""

    tensors: list[TensorReport]
    digests: dict[str, str]
    """SHA-256 of each stored tensor's bytes, read back from the store."""

    def to_dict(self) -> dict[str, Any]:
        return {"tensors": [asdict(tensor) for tensor in self.tensors], "digests": self.digests}


def _is_copy_of(parent: str, report: TensorReport) -> bool:
    return report.method == "passthrough" and bool(report.parameters["source"] == parent)


def _new_report(merger: Merger, run: Run, tensor: LogicalTensor) -> TensorReport:
    way = run.way(tensor)
    with_it = [name for name, parent in merger.plan.maps.items() if tensor.name in parent.by_name]
    return TensorReport(
        tensor.name,
        tensor.component,
        tensor.layer,
        tensor.elements,
        way.method.name,
        way.values,
        dict.fromkeys(with_it, 0),
        0,
    )


def write_weights(
    merger: Merger,
    recipe: Recipe,
    target: Store,
    threads: int,
    notify: Callable[[int], None] = lambda written: None,
) -> ChildReport:
    """Merge into `target` in the father's layout, then read everything back (the health check).

    The folder is not a checkpoint yet: `publish_companions` makes it one. `notify` is called with the
    number of bytes each time that some were written. Raises `BadInputError` if a
    tensor of the child holds a NaN or an infinity, and is not the father's own.
    """
    father = next(iter(merger.parents.values()))
    writer = CheckpointWriter(father, target)
    run = merger.start(recipe)
    digests: dict[str, str] = {}
    running = hashlib.sha256()
    reports = []
    try:
        for tensor in merger.plan.father.tensors:
            report = _new_report(merger, run, tensor)
            reports.append(report)
            for unit in run.units(tensor):
                values = torch.empty(unit.count, dtype=TORCH_DTYPES[tensor.dtype])
                run.fill(unit, values)
                for name in report.changed:
                    own = merger.sources[name].read(
                        merger.plan.maps[name].by_name[tensor.name], unit.first, unit.count
                    )
                    report.changed[name] += int((own.to(values.dtype) != values).sum())
                if values.is_floating_point():
                    finite = (
                        values if values.dtype == torch.float64 else values.float()
                    ).isfinite()
                    report.not_finite += finite.numel() - int(finite.sum())
                if tensor.offset == 0 and unit.first == 0:
                    running = hashlib.sha256()
                data = values.view(torch.uint8).numpy().data
                running.update(data)
                digests[tensor.stored] = running.hexdigest()
                writer.write(tensor.stored, data)
                notify(data.nbytes)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    name = next(iter(merger.parents))
    broken = [r for r in reports if r.not_finite and not _is_copy_of(name, r)]
    if broken:
        raise BadInputError(
            f"tensor {broken[0].name!r} of the child has {broken[0].not_finite} elements that are NaN "
            f"or infinite ({len(broken)} such tensors): a parent is damaged, or a parameter too large"
        )
    verify_weights(father, target, digests)
    return ChildReport(reports, digests)
