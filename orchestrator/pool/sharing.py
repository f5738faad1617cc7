"""How campaigns share a cluster: whose workers make room for whose.

Every driver pins a note to the cluster's `board` every few seconds: its priority, what its workers hold, and
which of its places have no room. From the notes of all, each works out by the same rules which of its own
places are to be given up or taken back; nobody is asked, and a driver that dies is forgotten with its note.
Nothing here steers a search: which worker scores a candidate does not matter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.pool.room import Resources, has_room, take

PATIENCE_SECONDS = 10.0
"""A worker's process takes some seconds to start: until then nobody says that its place waits for room."""

GRACE_SECONDS = 20.0
"""So long room that was given up is left to those whom it was given up for: their workers start meanwhile."""

NOTHING = (-sys.maxsize, 0)


@dataclass(frozen=True)
class Place:
    """A place of a worker, or of a gang, and what becomes of it.

    `held`: it has room, which may be given up; `kept`: its room is reserved together with that of others;
    `leaving`: its room is about to be free, or has just become so; `waiting`: its worker waits for room in
    Ray's queue; `away`: its worker was ended, and would have room again.
    """

    number: int
    state: str
    bundles: list[dict[str, float]]
    """What is needed, on one node each."""
    nodes: list[str] | None = None
    """Of each bundle, where there is room or was."""
    apart: bool = False
    """Whether the bundles must be on different nodes."""

    @property
    def wants(self) -> bool:
        """Whether it has no room and would have some."""
        return self.state in ("waiting", "away")


@dataclass(frozen=True)
class Note:
    """What a driver says of itself."""

    priority: int
    arrival: int
    """Smaller for those that have come first."""
    places: Sequence[Place]

    @property
    def rank(self) -> tuple[int, int]:
        return (-self.priority, self.arrival)


@dataclass
class Decision:
    """What a driver does: numbers of its places."""

    give_up: set[int] = field(default_factory=set)
    """Workers that end after the call they are in."""
    withdraw: set[int] = field(default_factory=set)
    """Workers that leave Ray's queue, which would give them room that is meant for others."""
    take_back: set[int] = field(default_factory=set)
    """Workers that are started again, if only to wait in Ray's queue."""

    def __bool__(self) -> bool:
        return bool(self.give_up or self.withdraw or self.take_back)


class _Room:
    """What nodes have free, or will have, and which places may still be given up."""

    def __init__(self, notes: Iterable[Note], free: Mapping[str, Resources]) -> None:
        self.free = {node: dict(resources) for node, resources in free.items()}
        self.on_node: dict[str, list[tuple[Note, Place]]] = {}
        """Places that are held there: those first that are given up first."""
        for note in sorted(notes, key=lambda note: note.rank, reverse=True):
            for place in reversed(note.places):
                if place.nodes is None:
                    continue
                if place.state == "leaving":
                    self._free(place)
                elif place.state == "held":
                    for node in dict.fromkeys(place.nodes):
                        self.on_node.setdefault(node, []).append((note, place))

    def _free(self, place: Place) -> None:
        for node, bundle in zip(place.nodes or (), place.bundles, strict=True):
            if node in self.free:  # else it is lost
                take(self.free[node], bundle, -1.0)

    def make(self, place: Place, priority: int) -> list[tuple[Note, Place]] | None:
        """Give the place room, and say which places of lower priority are given up for it: of the lowest, and
        as few as will do. None if there can be no room, whoever gives up."""
        free = {node: dict(resources) for node, resources in self.free.items()}
        on_node = {node: list(places) for node, places in self.on_node.items()}
        found: list[tuple[Note, Place]] = []
        taken: set[str] = set()
        for bundle in place.bundles:
            ways = {
                node: way
                for node in self.free
                if node not in taken and (way := self._way(node, bundle, priority)) is not None
            }
            if not ways:
                self.free, self.on_node = free, on_node
                return None
            node = min(ways, key=lambda node: (_cost(ways[node]), node))
            way = ways[node]
            for other in way:
                self._give_up(other)
            found += way
            take(self.free[node], bundle)
            if place.apart:
                taken.add(node)
        return found

    def _way(self, node: str, bundle: Resources, priority: int) -> list[tuple[Note, Place]] | None:
        """Places of lower priority without which the bundle fits on the node."""
        room = dict(self.free[node])
        way: list[tuple[Note, Place]] = []
        for other in self.on_node.get(node, ()):
            if has_room(room, bundle):
                break
            if other[0].priority < priority:
                way.append(other)
                _move(room, node, other[1], -1.0)
        if not has_room(room, bundle):
            return None
        for other in reversed(way):  # what was of no help: it has something else
            _move(room, node, other[1], 1.0)
            if has_room(room, bundle):
                way = [one for one in way if one is not other]
            else:
                _move(room, node, other[1], -1.0)
        return way

    def _give_up(self, other: tuple[Note, Place]) -> None:
        self._free(other[1])
        for node in dict.fromkeys(other[1].nodes or ()):
            self.on_node[node] = [one for one in self.on_node[node] if one is not other]


def _cost(way: list[tuple[Note, Place]]) -> tuple[tuple[int, int], int]:
    """Less for what is better given up."""
    return max(((note.priority, -note.arrival) for note, _ in way), default=NOTHING), len(way)


def _move(room: dict[str, float], node: str, place: Place, times: float) -> None:
    """Take what a place has on a node out of the room, or (-1) put it in."""
    for where, bundle in zip(place.nodes or (), place.bundles, strict=True):
        if where == node:
            take(room, bundle, times)


def decide(own: Note, notes: Iterable[Note], free: Mapping[str, Resources]) -> Decision:
    """What the driver of the note `own`, which is one of `notes`, does. `free` has what nodes have free.

    Places without room get some in the order of their campaigns' priorities, and of their arrival where these
    are equal. Only those of lower priority are given up for one, and only if it gets room by that. Where a
    campaign that comes before has places without room, one does not queue for what there may be later.
    Where none has, and no room is on its way to anybody, one does: a cluster that grows by demand sees no
    other.
    """
    notes = list(notes)
    in_motion = any(place.state == "leaving" for note in notes for place in note.places)
    room, now = _Room(notes, free), _Room((), free)
    decision = Decision()
    others_want = False
    hopeless: list[tuple[list[dict[str, float]], bool]] = []
    """What found no room: nor does it for those that come after."""
    for note in sorted(notes, key=lambda note: note.rank):
        wanting = [place for place in note.places if place.wants]
        for place in wanting:
            needs = (place.bundles, place.apart)
            given = None if needs in hopeless else room.make(place, note.priority)
            has_room_now = given == [] and now.make(place, note.priority) is not None
            if given is None and needs not in hopeless:
                hopeless.append(needs)
            for other, gives in given or ():
                if other is own:
                    decision.give_up.add(gives.number)
            if note is not own:
                continue
            if place.state == "away" and (has_room_now or not (others_want or in_motion)):
                decision.take_back.add(place.number)
            elif place.state == "waiting" and given is None and others_want:
                decision.withdraw.add(place.number)
        others_want = others_want or bool(wanting)
    return decision
