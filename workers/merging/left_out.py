"""What a merge would leave out in silence: tensors of a parent that the child has not, and tensors of the
father that no rule knows."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.checkpoints.names import CAUSAL_MASK, CONSTANTS
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT
from workers.errors import BadInputError
from workers.merging.recipe import CARRIED
from workers.merging.selector import Selector

BLOCKS = {
    "attention": "mixer", "linear_attention": "mixer",
    "mlp": "network", "expert": "network", "shared_expert": "network",
    "router": "router",
}  # fmt: skip
"""The block of a layer that a component works in; norms, and what else is in a layer, are of all of it."""


class LeftOut:
    """What of the parents is not in `child`, each parent looked at once."""

    def __init__(self, child: ArchitectureMap) -> None:
        self._child = child
        self._of: dict[str, list[LogicalTensor]] = {}

    def check(self, name: str, parent: ArchitectureMap, tensor: LogicalTensor) -> None:
        """Raise `BadInputError` if what the parent called `name` has for `tensor` does something else in the
        child: if the parent has further layers, or beside it tensors (a bias, a norm) that the child has not.
        """
        if tensor.layer is None or tensor.component in CARRIED:
            return
        child, where = self._child, f"{name} ({parent.location})"
        if parent.layers > child.layers:
            stored = [t.stored for t in parent.tensors if (t.layer or 0) >= child.layers]
            raise BadInputError(
                f"{where} has {parent.layers} layers, but {child.location} has {child.layers}: {len(stored)} "
                f"tensors, the first of them {stored[0]!r}, would be left out, and its other layers do "
                "something else without them: choose a father with as many layers, or say in a recipe's "
                "`layers` which of them are merged"
            )
        if name not in self._of:
            self._of[name] = [other for other in parent.tensors if self._is_missed(other)]
        block = BLOCKS.get(tensor.component)
        for other in self._of[name]:
            if other.layer == tensor.layer and BLOCKS.get(other.component) in (block, None):
                raise BadInputError(
                    f"{where} has {_count(self._of[name])} in its layers that {child.location} has not, such "
                    f"as {other.stored!r}, and its {tensor.name!r} does something else without it: choose it "
                    f"as the father, or let a `passthrough` rule take the {tensor.component} tensors of such "
                    "layers from the father"
                )

    def _is_missed(self, tensor: LogicalTensor) -> bool:
        # Routed experts beyond the father's may be left out: a transplant wants some of a donor's.
        does_without = tensor.component in (*CARRIED, "expert")
        is_there = tensor.name in self._child.by_name
        return tensor.layer is not None and not is_there and not does_without


def check_recognised(child: ArchitectureMap, father: str, rules: Collection[Selector]) -> None:
    """Raise `BadInputError` if nothing in any layer is known by name, and no rule is for what is not.

    A model that calls its layers otherwise would be merged in its head alone, say.
    """
    if any(t.layer is not None and t.component != "unknown" for t in child.tensors):
        return
    unknown = _unknown(child)
    if unknown and not any(where.matches(tensor) for where in rules for tensor in unknown):
        raise BadInputError(
            f"{father}: none of its layers is known by name: {_count(unknown)}, such as "
            f"{unknown[0].stored!r}, would be the father's as they are. Name them in rules (where: names), "
            "or merge checkpoints whose layers are called model.layers.N"
        )


def unknown_warnings(child: ArchitectureMap, father: str, chosen: Collection[str]) -> list[str]:
    """What the user should know of tensors of no known kind that no rule has `chosen`; at most one text."""
    left = [tensor for tensor in _unknown(child) if tensor.name not in chosen]
    if not left:
        return []
    share = 100 * _bits(left) / (_bits(child.tensors) or 1)
    return [
        f"{father}: {_count(left)} of no known kind, such as {left[0].stored!r}: {share:.3g} % of the "
        "child's bytes are the father's as they are. Name them in a rule (where: names) to merge them"
    ]


def _unknown(child: ArchitectureMap) -> list[LogicalTensor]:
    return [
        tensor
        for tensor in child.tensors
        if tensor.component == "unknown" and not _is_constant(tensor)
    ]


def _is_constant(tensor: LogicalTensor) -> bool:
    is_mask = len(tensor.shape) == 4 and CAUSAL_MASK.fullmatch(tensor.name)
    return bool(is_mask or CONSTANTS.fullmatch(tensor.name))


def _count(tensors: Collection[LogicalTensor]) -> str:
    return f"{len(tensors)} tensor{'s' if len(tensors) != 1 else ''}"


def _bits(tensors: Iterable[LogicalTensor]) -> int:
    return sum(tensor.elements * BITS_PER_ELEMENT[tensor.dtype] for tensor in tensors)
