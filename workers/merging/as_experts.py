"""The rows of routers, each merged as the matrices of its expert are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from workers.checkpoints import LogicalTensor
from workers.errors import BadInputError
from workers.merging.expert_order import ExpertPlaces

if TYPE_CHECKING:
    from workers.merging.assignment import Assignment


def with_rows(
    tensor: LogicalTensor, way: Assignment, places: ExpertPlaces, assigned: dict[str, Assignment]
) -> Assignment:
    """`way`, whose method is as_experts, with the assignment of each row of `tensor`.

    `assigned`: logical name -> assignment of the experts' matrices. Raises `BadInputError` for a tensor
    without a row for each expert, and for an expert whose matrices are merged in several ways or by a
    method that needs them whole.
    """
    if not places.has_row_each(tensor):
        experts = places.experts.get(tensor.layer, 0) if tensor.layer is not None else 0
        raise BadInputError(
            f"{places.location}: tensor {tensor.name!r} of shape {list(tensor.shape)}: method as_experts is "
            f"for routers, which have a row for each expert of their layer, here {experts}: give it a rule "
            "of its own (linear, passthrough)"
        )
    assert tensor.layer is not None
    rows = tuple(
        _way_of_expert(tensor.layer, expert, matrices, assigned)
        for expert, matrices in enumerate(places.matrices[tensor.layer])
    )
    used = {name for row in rows for name in row.parents}
    parents = tuple(name for name in way.parents if name in used)
    return replace(way, parents=parents, rows=rows)


def _way_of_expert(
    layer: int, expert: int, matrices: tuple[str, ...], assigned: dict[str, Assignment]
) -> Assignment:
    where = f"method as_experts: expert {expert} of layer {layer}"
    if not matrices:
        raise BadInputError(f"{where}: has no matrices")
    way = assigned[matrices[0]]
    for name in matrices[1:]:
        if assigned[name] is not way and assigned[name] != way:
            raise BadInputError(
                f"{where}: {matrices[0]} and {name} are merged in different ways, so it is not said how its "
                "row of the router is: give all matrices of an expert one rule, or the router a rule of its "
                "own"
            )
    for step in (way.method, way.post):
        if step is not None and step.grain == "matrix":
            raise BadInputError(
                f"{where}: is merged by {step.name}, which needs whole matrices and means nothing for a row: "
                "give the router a rule of its own"
            )
    return way
