"""as_experts: each row of a router merged as the expert is that it chooses.

Our own; that a router's rows should go with their experts is what "expert transplant" means.
"""

from __future__ import annotations

from workers.merging.methods.method import PLAN_METHODS, MergeMethod, Slice, Values


def merge(piece: Slice, values: Values) -> None:
    """Never called: the plan gives each row the method of its expert (see `workers.merging.as_experts`)."""
    raise AssertionError("as_experts merges nothing itself")


AS_EXPERTS = MergeMethod(
    name="as_experts",
    summary="row e of a router as expert e of its layer is merged",
    parameters=(),
    merge=merge,
    grain="row",
)
PLAN_METHODS[AS_EXPERTS.name] = AS_EXPERTS
