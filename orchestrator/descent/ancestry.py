"""The ancestry: who a child descends from, over all generations, and how much each gave to the next.

It is kept whole in the child's lineage, so it does not need the ancestors' stores: of each ancestor once,
under its fingerprint, what it was called, what it was made of and what it scored, not its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

ROLES = ("father", "mother", "base", "bred")
"""What an ancestor was to its child. One that is `bred` was never written: the search of a later round
began from it."""

BASED_ON = ("recipe", "measured")
"""Where shares come from: the recipe's weights, or the child's bytes."""

MOST_ANCESTORS = 1000
"""Beyond, those farthest from the child are left out."""
LONGEST_TEXT = 300

Shares = dict[str, float]
"""Component -> share of it."""


@dataclass(frozen=True)
class Descent:
    """That an ancestor gave something to its child."""

    node: str
    """The ancestor's key: its fingerprint, or `recipe:ID` if it was never written."""
    name: str
    """What the child's recipe called it."""
    role: str
    shares: Shares
    """What it gave of each component of the child."""


@dataclass(frozen=True)
class Ancestor:
    """What is remembered of a checkpoint, or of a child that was only bred from."""

    name: str
    fingerprint: str | None = None
    recipe_id: str | None = None
    campaign: str | None = None
    license: str | None = None
    hub: str | None = None
    revision: str | None = None
    scores: dict[str, Any] | None = None
    """Of a campaign's child: `objective`, its held-out `fitness`, which parents it has `beaten`."""
    elements: dict[str, int] | None = None
    """Component -> elements; None of a founder."""
    based_on: str = "recipe"
    """Where the shares of its parents come from, one of `BASED_ON`."""
    parents: tuple[Descent, ...] = ()
    """Those that its recipe merges, and its base; none of a founder."""
    through: tuple[Descent, ...] = ()
    """Those that were bred in between; what they gave is in `parents` already."""
    note: str | None = None
    """What is wrong with what it says of itself, or what was left out."""

    @property
    def nearest(self) -> tuple[Descent, ...]:
        """Those right behind it: what it was bred through, or else its parents."""
        return self.through or self.parents

    def overall(self, shares: Mapping[str, float]) -> float:
        """One share of all components, by their elements."""
        total = sum((self.elements or {}).values())
        given = sum(n * shares.get(part, 0.0) for part, n in (self.elements or {}).items())
        return given / total if total else 0.0


Following = Callable[[Ancestor], Iterable[Descent]]
"""Which ways are followed back from somebody."""


@dataclass(frozen=True)
class Ancestry:
    """A child and everybody that it descends from, the nearest first."""

    child: Ancestor
    ancestors: dict[str, Ancestor]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `parse_ancestry`."""
        return {
            "child": _to_dict(self.child),
            "ancestors": {key: _to_dict(found) for key, found in self.ancestors.items()},
        }

    def shares(self, following: Following = lambda ancestor: ancestor.parents) -> dict[str, Shares]:
        """Key -> component -> share in the child, of everybody that it is merged of.

        Shares multiply from generation to generation, component by component, and add up over the ways
        that lead to an ancestor. An ancestor's share is in that of its parents, too: those of the
        founders are what adds up to the child. With `following`, other ways than those to the parents.
        """
        found: dict[str, Shares] = {}
        own = dict.fromkeys(self.child.elements or {}, 1.0)
        _give(self.child, following(self.child), own, found)
        for key in self.in_order(following):
            _give(self.ancestors[key], following(self.ancestors[key]), found[key], found)
        return found

    def in_order(self, following: Following) -> list[str]:
        """The keys of all that are reached, each behind all of its descendants."""
        return _in_order(self.child, self.ancestors, following)

    def founders(self) -> list[str]:
        """The keys of those that nothing older is known of, each once; the largest share first."""
        shares = self.shares()
        order = [key for key in shares if not self.ancestors[key].parents]
        return sorted(order, key=lambda key: -self.child.overall(shares[key]))

    def licences(self) -> dict[str, list[str]]:
        """Licence ("" for none declared) -> keys of those that declare it, bases among them."""
        found: dict[str, list[str]] = {}
        for key, ancestor in self.ancestors.items():
            if ancestor.fingerprint is not None:  # else it was never written
                found.setdefault(ancestor.license or "", []).append(key)
        return dict(sorted(found.items(), key=lambda item: (not item[0], item[0])))


def _give(
    giver: Ancestor, descents: Iterable[Descent], own: Shares, found: dict[str, Shares]
) -> None:
    """Add to each one's shares what it has in the child through this giver, who has `own`."""
    for descent in descents:
        shares = found.setdefault(descent.node, dict.fromkeys(own, 0.0))
        for component, share in own.items():
            shares[component] += share * share_in(giver, descent, component)


def share_in(child: Ancestor, descent: Descent, component: str) -> float:
    """What a parent gave of a component; if the child has no such component, of all of it."""
    if component in (child.elements or {}):
        return descent.shares.get(component, 0.0)
    return child.overall(descent.shares)


def _in_order(
    child: Ancestor,
    ancestors: Mapping[str, Ancestor],
    following: Following,
) -> list[str]:
    """The keys of all that are reached, each behind all of its descendants.

    Raises `ValueError` if one is its own ancestor, or is not there.
    """
    done: dict[str, bool] = {}  # False while its ancestors are visited
    order: list[str] = []
    # A stack of our own: a chain of ancestors may be longer than Python lets calls be nested.
    stack = [iter([descent.node for descent in following(child)])]
    path: list[str] = []
    while stack:
        key = next(stack[-1], None)
        if key is None:
            stack.pop()
            if path:
                done[path[-1]] = True
                order.append(path.pop())
        elif key not in ancestors:
            raise ValueError(f"there is no ancestor {key!r}")
        elif key not in done:
            done[key] = False
            path.append(key)
            stack.append(iter([descent.node for descent in following(ancestors[key])]))
        elif not done[key]:
            raise ValueError(f"{key!r} is its own ancestor")
    return order[::-1]


def join(child: Ancestor, parents: Iterable[tuple[str, Ancestry]]) -> Ancestry:
    """The child with its parents' ancestries, by key, as one; each ancestor is in it once, the nearest
    first, and of too many the nearest."""
    known: dict[str, Ancestor] = {}
    for key, ancestry in parents:
        for other, ancestor in ({key: ancestry.child} | ancestry.ancestors).items():
            # Whoever knows more of its ancestors is right: the other met it without its lineage.
            if other not in known or (ancestor.parents and not known[other].parents):
                known[other] = ancestor
    nearest: dict[str, Ancestor] = {}
    waiting = [descent.node for descent in (*child.through, *child.parents)]
    for key in waiting:  # grows
        if key in known and key not in nearest and len(nearest) < MOST_ANCESTORS:
            nearest[key] = known[key]
            waiting += [d.node for d in (*known[key].through, *known[key].parents)]
    for key, ancestor in nearest.items():
        if any(d.node not in nearest for d in (*ancestor.parents, *ancestor.through)):
            nearest[key] = replace(
                ancestor, parents=(), through=(), note="earlier ancestors are left out"
            )
    _in_order(child, nearest, lambda ancestor: (*ancestor.parents, *ancestor.through))
    return Ancestry(child, nearest)


def _to_dict(ancestor: Ancestor) -> dict[str, Any]:
    """What is known, without what is not."""
    data = {key: value for key, value in asdict(ancestor).items() if value not in (None, ())}
    for key in ("parents", "through"):
        for descent in data.get(key, ()):
            descent["shares"] = {part: round(n, 6) for part, n in descent["shares"].items()}
        if key in data:
            data[key] = list(data[key])
    return data


def parse_ancestry(data: Any) -> Ancestry:
    """Read what `to_dict` wrote. Raises `ValueError` for anything else, also for what cannot be."""
    table = _typed(data, dict)
    ancestors = _typed(table.get("ancestors"), dict)
    if len(ancestors) > MOST_ANCESTORS:
        raise ValueError(f"more than {MOST_ANCESTORS} ancestors")
    ancestry = Ancestry(
        _parse_ancestor(table.get("child")),
        {_text(key): _parse_ancestor(found) for key, found in ancestors.items()},
    )
    _in_order(ancestry.child, ancestry.ancestors, lambda found: (*found.parents, *found.through))
    return ancestry


def _parse_ancestor(data: Any) -> Ancestor:
    table = _typed(data, dict)
    texts = ("fingerprint", "recipe_id", "campaign", "license", "hub", "revision", "note")
    elements = table.get("elements")
    return Ancestor(
        name=_text(table.get("name")),
        scores=parse_scores(table.get("scores")),
        elements=None if elements is None else {
            _text(key): int(_number(n, 0, 1e18)) for key, n in _typed(elements, dict).items()
        },
        based_on=_one_of(table.get("based_on"), BASED_ON),
        parents=tuple(_parse_descent(found) for found in _typed(table.get("parents", []), list)),
        through=tuple(_parse_descent(found) for found in _typed(table.get("through", []), list)),
        **{key: None if table.get(key) is None else _text(table[key]) for key in texts},
    )  # fmt: skip


def _parse_descent(data: Any) -> Descent:
    table = _typed(data, dict)
    shares = {_text(k): _number(n, -1e3, 1e3) for k, n in _typed(table.get("shares"), dict).items()}
    role = _one_of(table.get("role"), ROLES)
    return Descent(_text(table.get("node")), _text(table.get("name")), role, shares)


def parse_scores(data: Any) -> dict[str, Any] | None:
    """The headline of what a child scored."""
    if data is None:
        return None
    table = _typed(data, dict)
    return {
        "objective": _text(table.get("objective")),
        "fitness": _number(table.get("fitness"), -1e9, 1e9),
        "beaten": [_text(name) for name in _typed(table.get("beaten"), list)],
    }


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.80} is not a {kind.__name__}")
    return value


def _text(value: Any) -> str:
    text: str = _typed(value, str)
    return text[:LONGEST_TEXT]


def _one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r:.80} is none of {', '.join(known)}")
    return _text(value)


def _number(value: Any, low: float, high: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{value!r:.80} is no number from {low:g} to {high:g}")
    return float(value)
