"""A driver's part in the board: which answers it follows. The board itself is tested on real clusters."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import ray._private.state

import orchestrator.pool.board as board_module
from orchestrator.pool.board import EXPIRY_SECONDS, POST_SECONDS, Sharing
from orchestrator.pool.sharing import Decision, Place


class Crew:
    """One worker, on the one node there is."""

    def __init__(self) -> None:
        self.told: list[Decision] = []

    def describe_places(self) -> list[Place]:
        return [Place(0, "held", [{"CPU": 1.0}], ["x"])]

    def may_use(self, node: str) -> bool:
        return True

    def follow(self, decision: Decision) -> None:
        self.told.append(decision)


class Board:
    """Answers at once, with a note of higher priority that waits; the answer is what Ray refers to."""

    def __init__(self) -> None:
        self.pin = self
        self.asked = 0

    def remote(self, name: str, note: dict[str, Any], expiry: float) -> dict[str, Any]:
        self.asked += 1
        waiting = Place(0, "waiting", [{"CPU": 1.0}])
        return {name: (1, note), "other": (2, {"priority": 1, "places": [vars(waiting)]})}


def test_an_answer_that_was_left_lying_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that was busy for a minute does not end workers for a campaign that may be over."""
    clock, board, crew = [100.0], Board(), Crew()

    class Time:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

    monkeypatch.setattr(board_module, "time", Time)
    monkeypatch.setattr(board_module, "_open_board", lambda: board)
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: {"x": {}})
    sharing = Sharing(priority=0)
    sharing.turn(crew)
    clock[0] += EXPIRY_SECONDS + 1.0
    sharing.turn(crew)
    assert (board.asked, crew.told) == (1, [])
    sharing.turn(crew)
    clock[0] += POST_SECONDS / 2
    sharing.turn(crew)
    assert (board.asked, crew.told) == (2, [Decision(give_up={0})])
