"""Write a child's weights into a store and prove that they lie there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from workers.checkpoints import CheckpointWriter
from workers.checkpoints.verify import verify_weights
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.executor import Merger, TensorReport
from workers.merging.sinks import CheckpointSink
from workers.storage import Store


@dataclass(frozen=True)
class ChildReport:
    """What a written child consists of."""

    tensors: list[TensorReport]
    digests: dict[str, str]
    """SHA-256 of each stored tensor's bytes, read back from the store."""

    def to_dict(self) -> dict[str, Any]:
        return {"tensors": [asdict(tensor) for tensor in self.tensors], "digests": self.digests}


def _is_copy_of(parent: str, report: TensorReport) -> bool:
    return report.method == "passthrough" and report.parameters["source"] == parent


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
    sink = CheckpointSink(writer, notify)
    try:
        reports = merger.run_with_report(recipe, sink, threads)
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
    verify_weights(father, target, sink.digests)
    return ChildReport(reports, sink.digests)
