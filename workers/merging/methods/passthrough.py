"""passthrough: one parent's tensor, as it is or scaled."""

from __future__ import annotations

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def merge(piece: Slice, values: Values) -> None:
    """out = scale * source. With a scale of 1 only reached when the source is rounded to another dtype."""
    import torch

    torch.mul(piece.parents[values["source"]], values["scale"], out=piece.out)


register(
    MergeMethod(
        name="passthrough",
        summary="one parent's tensor, bit by bit, or scaled",
        parameters=(
            Parameter("source", "parent_name"),
            Parameter("scale", "shared", default=1.0),
        ),
        merge=merge,
        coefficients=lambda values: {values["source"]: values["scale"]},
        copies=lambda values: bool(values["scale"] == 1.0),
    )
)
