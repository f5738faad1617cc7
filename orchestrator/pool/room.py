"""Room on nodes: whether what workers need fits in what nodes have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TINY = 1e-9
"""Of a resource: sums of parts of one are not exact."""

Resources = Mapping[str, float]
"""By Ray's names; memory in bytes."""


def has_room(node: Resources, needs: Resources) -> bool:
    """Whether a node has all of it."""
    return all(node.get(name, 0.0) + TINY >= size for name, size in needs.items())


def fit(
    bundles: Sequence[Resources], nodes: Mapping[str, Resources], apart: bool = False
) -> list[str] | None:
    """The node of each bundle if all of them fit; None if they do not.

    The largest go first, each to the first node that has room for it; with `apart` no two to the same.
    For bundles that are alike this finds room whenever there is any.
    """
    left = {name: dict(node) for name, node in nodes.items()}
    found: dict[int, str] = {}
    for number in sorted(range(len(bundles)), key=lambda n: -sum(bundles[n].values())):
        needs = bundles[number]
        taken = set(found.values()) if apart else set()
        name = next((n for n, has in left.items() if n not in taken and has_room(has, needs)), None)
        if name is None:
            return None
        take(left[name], needs)
        found[number] = name
    return [found[number] for number in range(len(bundles))]


def take(node: dict[str, float], needs: Resources, times: float = 1.0) -> None:
    """Subtract what is needed; with `times` -1 give it back."""
    for name, size in needs.items():
        node[name] = node.get(name, 0.0) - times * size
