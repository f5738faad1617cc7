"""Which experts of a layer belong together: the order of a parent's, and what is stored for each of them.

A parent's expert has its own number, which need not be that of its counterparts in the other parents. A
recipe may therefore say, for each place in a layer of the child, which expert of a parent belongs there.
That expert's matrices, its row of the router and whatever else is stored for it go together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.errors import BadInputError

ExpertOrders = dict[str, dict[int, tuple[int, ...]]]
"""Parent (or `base`) -> layer -> for each place of the child's layer the number of that parent's expert."""

LAYER = re.compile("0|[1-9][0-9]{0,5}")
"""A layer's number as a text: one only for each, as a layer can have one order."""

NOT_PER_EXPERT = (".router.scale", ".router.norm.weight")
"""Parts of routers that are for hidden states, also where there are as many of these as experts (Gemma 4)."""


def parse_orders(data: Any, parents: list[str], has_base: bool) -> ExpertOrders:
    """Orders from plain data, `{parent: {layer: [number, ...]}}`, the layers also as texts, as in JSON.

    `parents`: the father first. An order that changes nothing is left out. Raises `BadInputError` naming
    parent and layer for what is no order of experts.
    """
    if not isinstance(data, dict):
        raise BadInputError(f"experts: {data!r} is not a table of parents")
    found: ExpertOrders = {}
    for name, layers in data.items():
        _check_name(name, parents, has_base)
        if not isinstance(layers, dict):
            raise BadInputError(f"experts: {name}: {layers!r} is not a table of layers")
        for layer, numbers in layers.items():
            text = str(layer)
            if isinstance(layer, bool) or not LAYER.fullmatch(text):
                raise BadInputError(f"experts: {name}: {layer!r} is not the number of a layer")
            order = _order(name, text, numbers)
            if order != tuple(range(len(order))):
                found.setdefault(name, {})[int(text)] = order
    return found


def check_lengths(data: dict[str, dict[Any, Any]], child: ArchitectureMap) -> None:
    """Raise `BadInputError` for an order of more or fewer experts than a layer of the child has.

    `data`: as given to `parse_orders`, which leaves out an order that changes nothing whatever its length.
    """
    experts = experts_by_layer(child)
    for name, layers in data.items():
        for layer, numbers in layers.items():
            _check_length(name, int(layer), len(numbers), child.location, experts)


def _check_length(
    name: str, layer: int, length: int, location: str, experts: Mapping[int, int]
) -> None:
    if length != (count := experts.get(layer, 0)):
        raise BadInputError(
            f"experts: {name}: layer {layer}: orders {length} experts, but layer {layer} of {location} has "
            f"{count}"
        )


def _check_name(name: Any, parents: list[str], has_base: bool) -> None:
    known = [*parents[1:], *(["base"] if has_base else [])]
    if name == parents[0]:
        raise BadInputError(
            f"experts: {name}: the father's experts are the child's and keep their places; order those of "
            "the other parents"
        )
    if name not in known:
        raise BadInputError(f"experts: {name!r} is none of {known}")


def _order(name: str, layer: str, numbers: Any) -> tuple[int, ...]:
    good = isinstance(numbers, list | tuple) and all(type(number) is int for number in numbers)
    if not good or sorted(numbers) != list(range(len(numbers))):
        raise BadInputError(
            f"experts: {name}: layer {layer}: must name each of the parent's experts exactly once, counted "
            "from 0, in the order of the child's places"
        )
    return tuple(numbers)


def orders_to_dict(orders: ExpertOrders) -> dict[str, dict[str, list[int]]]:
    """Plain data, the inverse of `parse_orders`."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, layers in orders.items():
        for layer, order in sorted(layers.items()):
            if order != tuple(range(len(order))):
                found.setdefault(name, {})[str(layer)] = list(order)
    return found


class ExpertPlaces:
    """The experts of a child, and where those of the parents that belong to them lie.

    `maps`: parents by name and the base as `base`. Raises `BadInputError` naming parent and layer for an
    order that is not of as many experts as child and parent have there, and for a router that it would leave
    behind.
    """

    def __init__(
        self, orders: ExpertOrders, child: ArchitectureMap, maps: dict[str, ArchitectureMap]
    ) -> None:
        self._orders = orders
        self.location = child.location
        """Where the child's father lies."""
        self.experts = experts_by_layer(child)
        """Layer -> how many experts it has."""
        self.matrices = _matrices_by_layer(child, self.experts)
        """Layer -> of each expert the names of its matrices."""
        self._with_rows = {tensor.name for tensor in child.tensors if self._is_per_expert(tensor)}
        for name, layers in orders.items():
            if name not in maps:
                raise BadInputError(f"experts: {name!r} is none of {list(maps)}")
            own = experts_by_layer(maps[name])
            for layer, order in layers.items():
                _check_length(name, layer, len(order), child.location, self.experts)
                _check_length(name, layer, len(order), maps[name].location, own)
        self._check_routers(child)

    def _check_routers(self, child: ArchitectureMap) -> None:
        """Else a router would go on choosing ordered experts by the numbers that they had."""
        for tensor in child.tensors:
            if not self.is_of_all(tensor) or tensor.name.endswith(NOT_PER_EXPERT):
                continue
            for name in self._orders:
                if self._order(name, tensor) is not None:
                    raise BadInputError(
                        f"experts: {name}: layer {tensor.layer}: tensor {tensor.name!r} of shape "
                        f"{list(tensor.shape)} in {child.location} belongs to the router and has no row for "
                        "each expert, so it cannot follow them: leave their order in this layer as it is"
                    )

    def _is_per_expert(self, tensor: LogicalTensor) -> bool:
        experts = self.experts.get(tensor.layer, 0) if tensor.layer is not None else 0
        return (
            tensor.component in ("router", "expert")
            and tensor.expert is None
            and experts > 0
            and (tensor.shape[:1] == (experts,) or tensor.shape == (1, experts))  # so Ernie 4.5
            and not tensor.name.endswith(NOT_PER_EXPERT)
        )

    def counterpart(self, name: str, tensor: LogicalTensor) -> str:
        """What a parent calls the tensor that belongs to the child's `tensor`."""
        order = self._order(name, tensor)
        if order is None or tensor.expert is None:
            return tensor.name
        here, there = f"experts.{tensor.expert}.", f"experts.{order[tensor.expert]}."
        return tensor.name.replace(here, there, 1)

    def rows(self, name: str, tensor: LogicalTensor) -> tuple[int, ...] | None:
        """For each row of a tensor that has one for each expert, the parent's row that belongs there.

        None: the rows are in the child's order.
        """
        order = self._order(name, tensor)
        return order if order is not None and self.has_row_each(tensor) else None

    def has_row_each(self, tensor: LogicalTensor) -> bool:
        """Whether the child's `tensor` has a row (of a vector, `[E]` or `[1, E]`: an element) for each expert
        of its layer."""
        return tensor.name in self._with_rows

    def is_of_all(self, tensor: LogicalTensor) -> bool:
        """Whether a router's `tensor` is for all experts of its layer together: it scales hidden states."""
        return (
            tensor.component == "router"
            and tensor.layer in self.experts
            and not self.has_row_each(tensor)
        )

    def _order(self, name: str, tensor: LogicalTensor) -> tuple[int, ...] | None:
        layers = self._orders.get(name)
        return None if layers is None or tensor.layer is None else layers.get(tensor.layer)


def experts_by_layer(architecture: ArchitectureMap) -> dict[int, int]:
    """Layer -> the number of its routed experts, of those layers that have any."""
    found: dict[int, int] = {}
    for tensor in architecture.tensors:
        if tensor.layer is not None and tensor.expert is not None:
            found[tensor.layer] = max(found.get(tensor.layer, 0), tensor.expert + 1)
    return found


def _matrices_by_layer(
    architecture: ArchitectureMap, experts: dict[int, int]
) -> dict[int, tuple[tuple[str, ...], ...]]:
    found: dict[int, list[list[str]]] = {
        layer: [[] for _ in range(count)] for layer, count in experts.items()
    }
    for tensor in architecture.tensors:
        if tensor.layer is not None and tensor.expert is not None and len(tensor.shape) == 2:
            found[tensor.layer][tensor.expert].append(tensor.name)
    return {layer: tuple(map(tuple, names)) for layer, names in found.items()}
