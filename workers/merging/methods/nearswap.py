"""nearswap: the father takes from the mother what differs by little."""

from __future__ import annotations

from workers.merging.methods.method import MergeMethod, Parameter, Slice, Values, register


def merge(piece: Slice, values: Values) -> None:
    """out = x_1 + w (x_2 - x_1), w = min(1, t / |x_2 - x_1|): x_1 moves towards x_2 by `t` at most.

    (alchemonaut, QuartetAnemoi-70B-t0.0001.) The first parent is what mergekit calls the base. Its
    differences below 1e-6 count as 1e-6, which is other only for smaller `t`.
    """
    import torch

    father, mother = piece.parents.values()
    difference = mother.sub_(father)
    torch.clamp(difference, -values["t"], values["t"], out=piece.out)
    # An infinite difference, though clamped, must not look like a sound one.
    piece.out.add_(difference.mul_(0.0)).add_(father)


register(
    MergeMethod(
        name="nearswap",
        summary="moves the first parent towards the second, by t at most",
        parameters=(Parameter("t", "shared", low=0.0),),
        merge=merge,
        parents=(2, 2),
    )
)
