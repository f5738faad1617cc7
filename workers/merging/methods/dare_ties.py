"""dare_ties: drop changes at random and rescale (arXiv 2311.03099), then the sign election of TIES."""

from __future__ import annotations

from workers.merging.methods.method import MergeMethod, Slice, Values, register
from workers.merging.methods.ties import consensus_parameters, merge_agreeing


def merge(piece: Slice, values: Values) -> None:
    """d_i = Bernoulli(density_i) (x_i - x_0) / density_i, then `ties.merge_agreeing`."""
    assert piece.base is not None
    for name, parent in piece.parents.items():
        delta = parent.sub_(piece.base)
        density = values["density"][name]
        if density == 0.0:
            delta.zero_()
        elif density < 1.0:
            delta.mul_(piece.keep_mask(name, density)).mul_(1.0 / density)
    merge_agreeing(piece, values)


register(
    MergeMethod(
        name="dare_ties",
        summary="drop at random and rescale (arXiv 2311.03099), then TIES sign election",
        parameters=consensus_parameters(normalize=0.0),
        merge=merge,
        uses_base="always",
    )
)
