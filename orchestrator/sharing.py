"""How campaigns share a cluster: whose workers make room for whose.

Every driver pins a note to a board of the cluster (a small actor of Ray) every few seconds: its priority,
what its workers hold, and which of its places have no room. From the notes of all, each works out by the same
rules which of its own places are to be given up or taken back; nobody is asked, and a driver that dies is
forgotten with its note. Nothing here steers a search: which worker scores a candidate does not matter.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.room import Resources, has_room, take

POST_SECONDS = 3.0

PATIENCE_SECONDS = 10.0
"""A worker's process takes some seconds to start: until then nobody says that its place waits for room."""

GRACE_SECONDS = 20.0
"""So long room that was given up is left to those whom it was given up for: their workers start meanwhile."""

EXPIRY_SECONDS = 15.0
"""A note that was not renewed for so long is of a driver that is gone."""

LEAVE_SECONDS = 2.0
"""A driver that ends waits no longer for the board."""

NOTHING = (-sys.maxsize, 0)

BOARD = "darwin-board-1"
NAMESPACE = "darwin"


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
    """Workers that are started again."""

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
    """
    notes = list(notes)
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
            if place.state == "away" and has_room_now:
                decision.take_back.add(place.number)
            elif place.state == "waiting" and given is None and others_want:
                decision.withdraw.add(place.number)
        others_want = others_want or bool(wanting)
    return decision


class Places(Protocol):
    """Whose places are shared."""

    def describe_places(self) -> list[Place]: ...
    def follow(self, decision: Decision) -> None: ...
    def may_use(self, node: str) -> bool: ...


class Sharing:
    """A driver's part in it, with the board of the Ray cluster that this process is connected to."""

    def __init__(self, priority: int) -> None:
        self._priority = priority
        self._name = uuid.uuid4().hex
        self._board: Any = None
        self._answer: Any = None
        self._posted = -POST_SECONDS

    def turn(self, places: Places) -> None:
        """Renew the note if it is time, and do what follows from the others'. Waits for nothing: a cluster
        whose board cannot be reached goes on as it is."""
        import ray

        now = time.monotonic()
        if self._answer is not None:
            done, _ = ray.wait([self._answer], timeout=0)
            if done:
                self._take(self._answer, places)
                self._answer = None
            elif now - self._posted > EXPIRY_SECONDS:
                self._board = self._answer = None
        elif now - self._posted > POST_SECONDS:
            self._posted = now
            described = [dict(vars(place)) for place in places.describe_places()]
            note = {"priority": self._priority, "places": described}
            try:
                self._board = self._board or _open_board()
                self._answer = self._board.pin.remote(self._name, note, EXPIRY_SECONDS)
            except (ray.exceptions.RayError, ValueError):
                self._board = None

    def _take(self, answer: Any, places: Places) -> None:
        import ray
        from ray._private.state import available_resources_per_node

        try:
            found = ray.get(answer)
            there_is = available_resources_per_node() if _matters(found) else {}
        except (ray.exceptions.RayError, RuntimeError):
            self._board = None
            return
        notes = {
            name: Note(note["priority"], arrival, [Place(**place) for place in note["places"]])
            for name, (arrival, note) in found.items()
        }
        free = {node: room for node, room in there_is.items() if places.may_use(node)}
        if free:
            places.follow(decide(notes[self._name], notes.values(), free))

    def leave(self) -> None:
        """Take the note away; who leaves the board empty ends it."""
        import ray

        if self._board is None:
            return
        try:
            if ray.get(self._board.remove.remote(self._name), timeout=LEAVE_SECONDS) == 0:
                ray.kill(self._board)
        except ray.exceptions.RayError:
            return  # the note expires


def _matters(found: Mapping[str, tuple[int, dict[str, Any]]]) -> bool:
    """Whether anything can follow from these notes: those who are alone wait in Ray's queue."""
    states = {place["state"] for _, note in found.values() for place in note["places"]}
    return "away" in states or ("waiting" in states and len(found) > 1)


def _open_board() -> Any:
    """The cluster's board. Its class is not known by a module: it is sent along, and needs nothing of Darwin
    where it runs."""
    import ray

    class Board:
        def __init__(self) -> None:
            self.notes: dict[str, tuple[int, dict[str, Any], float]] = {}
            self.arrivals = 0

        def pin(
            self, name: str, note: dict[str, Any], expiry: float
        ) -> dict[str, tuple[int, dict[str, Any]]]:
            import time

            now = time.monotonic()
            if name in self.notes:
                arrival = self.notes[name][0]
            else:
                arrival = self.arrivals = self.arrivals + 1
            self.notes[name] = (arrival, note, now)
            self.notes = {n: kept for n, kept in self.notes.items() if now - kept[2] < expiry}
            return {n: (kept[0], kept[1]) for n, kept in self.notes.items()}

        def remove(self, name: str) -> int:
            self.notes.pop(name, None)
            return len(self.notes)

    options = {"name": BOARD, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return ray.remote(Board).options(**options, num_cpus=0, max_restarts=-1).remote()
