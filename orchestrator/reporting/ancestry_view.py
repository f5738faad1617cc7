"""The ancestry as people see it: the tree in lines of text, and the table of founders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from orchestrator.descent.ancestry import Ancestor, Ancestry, Descent, Shares, share_in

MOST_LINES = 60
"""Of a tree in text; the lineage has it whole."""


@dataclass(frozen=True)
class Founder:
    """An ancestor of whom nothing older is known, and what of the child comes from it."""

    name: str
    ancestor: Ancestor
    share: float
    shares: Shares
    """Component -> its share in the child."""


def founders(ancestry: Ancestry) -> list[Founder]:
    """Each founder once, its shares summed over all the ways that lead to it; the largest first."""
    shares = ancestry.shares()
    return [
        Founder(
            ancestry.ancestors[key].hub or ancestry.ancestors[key].name,
            ancestry.ancestors[key],
            ancestry.child.overall(shares[key]),
            shares[key],
        )
        for key in ancestry.founders()
    ]


def licences(ancestry: Ancestry) -> list[tuple[str, list[str]]]:
    """(licence, or what stands for none; names of the ancestors that declare it)."""
    return [
        (
            licence or "not declared",
            [ancestry.ancestors[key].hub or ancestry.ancestors[key].name for key in keys],
        )
        for licence, keys in ancestry.licences().items()
    ]


def tree_lines(ancestry: Ancestry) -> list[str]:
    """The child and its ancestors below it, each with its share of the child on this way.

    Whoever is met again is not unfolded again. Children that were bred and never written stand between
    the child and its parents.
    """
    child = ancestry.child
    lines = [f"{child.name} (this child)"]
    own = dict.fromkeys(child.elements or {}, 1.0)
    below = _lines_below(ancestry, child, own, "", set())
    lines += islice(below, MOST_LINES)
    return [*lines, "..."] if next(below, None) else lines


def _lines_below(
    ancestry: Ancestry, child: Ancestor, own: Shares, margin: str, seen: set[str]
) -> Iterator[str]:
    shown = child.nearest
    for number, descent in enumerate(shown):
        ancestor = ancestry.ancestors[descent.node]
        last = number == len(shown) - 1
        shares = {part: share * share_in(child, descent, part) for part, share in own.items()}
        share = ancestry.child.overall(shares)
        again = descent.node in seen and bool(ancestor.nearest)
        yield (
            f"{margin}{'└── ' if last else '├── '}{share:6.1%} "
            f"{describe(descent, ancestor)}{', see above' if again else ''}"
        )
        if not again:
            seen.add(descent.node)
            below = margin + ("    " if last else "│   ")
            yield from _lines_below(ancestry, ancestor, shares, below, seen)


def describe(descent: Descent, ancestor: Ancestor) -> str:
    """Who an ancestor is, in a few words on one line."""
    name = ancestor.hub or descent.name
    if descent.role == "base" and ancestor.hub:
        name += " (base)"
    return " ".join(", ".join([name, *details(ancestor)]).split())


def details(ancestor: Ancestor) -> list[str]:
    """What is known of an ancestor besides its name and its licence."""
    words = []
    if ancestor.recipe_id and ancestor.fingerprint is None:
        words.append("bred, never written")
    elif ancestor.campaign and ancestor.campaign != ancestor.name:
        words.append(f"child of {ancestor.campaign}")
    elif ancestor.recipe_id:
        words.append("merged")
    if ancestor.scores:
        words.append(f"held out {ancestor.scores['fitness']:.3f}")
    if ancestor.note:
        words.append(ancestor.note)
    return words
