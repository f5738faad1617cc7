"""The board of a cluster, on which drivers tell each other what their workers hold and which wait for room.

It is a small actor of Ray, of no CPUs: the first driver starts it, the last one ends it, and nothing on it is
precious. What follows from the notes is `sharing`'s to say.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.pool.sharing import Decision, Note, Place, decide

POST_SECONDS = 3.0

EXPIRY_SECONDS = 15.0
"""A note that was not renewed for so long is of a driver that is gone."""

LEAVE_SECONDS = 2.0
"""A driver that ends waits no longer for the board."""

BOARD = "darwin-board-1"
NAMESPACE = "darwin"


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
            if now - self._posted > EXPIRY_SECONDS:  # of notes that may count no more
                self._answer, self._board = None, self._board if done else None
            elif done:
                self._take(self._answer, places)
                self._answer = None
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
