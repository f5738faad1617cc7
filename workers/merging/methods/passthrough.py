"""passthrough: one parent's tensor as it is."""

from __future__ import annotations

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def merge(piece: Slice, values: Values) -> None:
    """out = source. Only reached when the source's dtype is not the child's: it is rounded then."""
    piece.out.copy_(piece.parents[values["source"]])


register(
    MergeMethod(
        name="passthrough",
        summary="one parent's tensor, bit by bit",
        parameters=(Parameter("source", "parent_name"),),
        merge=merge,
        copies=True,
    )
)
