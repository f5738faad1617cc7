"""What a ledger says of the races of a campaign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from orchestrator.ledger.ledger import Record

RACE_KINDS = ("race", "block", "raced")
"""A race begins; a block of items has been asked and decided on; it has ended, and this is told."""

Key = tuple[int, int]
"""A generation, and how many of its candidates raced: fewer than all where the budget ended."""


class _Candidate(Protocol):
    @property
    def recipe_id(self) -> str: ...


class _Evaluation(Protocol):
    @property
    def finished_items(self) -> dict[str, list[str]]: ...


class Races:
    """The races that were begun, and what each has decided so far."""

    def __init__(self) -> None:
        self.begun: dict[Key, Record] = {}
        self.blocks: dict[Key, list[Record]] = {}
        self.ended: dict[Key, Record] = {}
        self.decided: set[str] = set()
        """The candidates of races that have ended."""
        self._told: dict[int, Record] = {}
        """Generation -> the record of its last race that has ended."""
        self._estimates: dict[str, float] = {}
        """Recipe -> what its last race that had an estimate says."""
        self._asked = self._of = 0
        self._before: dict[Key, dict[str, dict[str, list[str]]]] = {}
        self.runners: set[str] = set()
        """All candidates that ever raced."""

    def apply(
        self,
        record: Record,
        generations: Sequence[Sequence[_Candidate]],
        evaluations: Mapping[tuple[str, str], _Evaluation],
    ) -> None:
        """Take in one record of `RACE_KINDS`."""
        key = record["generation"], record["candidates"]
        if record["kind"] == "race":
            self.begun[key] = record
            self.blocks[key] = []
            recipes = {candidate.recipe_id for candidate in generations[key[0]]}
            self.runners |= recipes
            self._before[key] = {
                recipe: evaluations[recipe, "search"].finished_items
                for recipe in recipes
                if (recipe, "search") in evaluations
            }
        elif record["kind"] == "block":
            self.blocks[key].append(record)
        else:
            if key in self.ended:
                self._asked -= self.ended[key]["asked"]
                self._of -= self.ended[key]["of"]
            self.ended[key] = self._told[key[0]] = record
            self.blocks[key] = []  # they have decided what they were for
            self.decided |= record["told"].keys()
            known = {r: value for r, value in record["estimates"].items() if value is not None}
            self._estimates |= known
            self._asked += record["asked"]
            self._of += record["of"]

    def try_again(self) -> None:
        """Forget what was decided, because no candidate has answered anything; the items remain."""
        self.blocks = {key: [] for key in self.begun}
        for known in (self.ended, self.decided, self._told, self._estimates):
            known.clear()
        self._asked = self._of = 0

    def known_before(self, key: Key, recipe_id: str) -> dict[str, list[str]]:
        """Task -> the items that the recipe had answered when the race began."""
        return self._before[key].get(recipe_id, {})

    def told(self, generation: int) -> Mapping[str, float] | None:
        """What was told of a generation that raced, all of it; None if none has ended."""
        record = self._told.get(generation)
        return record["told"] if record is not None else None

    def estimate(self, recipe_id: str) -> float | None:
        """The fitness that the last race of a candidate has estimated."""
        return self._estimates.get(recipe_id)

    def items(self) -> tuple[int, int]:
        """How many items candidates of races that have ended were asked, and how many all would have been."""
        return self._asked, self._of

    def flat(self, generation: int) -> bool:
        """Whether a generation's race, if there was one, has found its candidates all alike."""
        return len(set((self.told(generation) or {}).values())) <= 1

    def to_dict(self) -> dict[str, Any] | None:
        """What a lineage says of them; None if there was none."""
        asked, of = self.items()
        return {"races": len(self.ended), "items_asked": asked, "items_of": of} if of else None


def saved_text(races: Mapping[str, Any]) -> str:
    """What racing has saved, for people; `races` is `Races.to_dict`."""
    asked, of = races["items_asked"], races["items_of"]
    return f"{asked} of {of} items asked ({1 - asked / of:.0%} saved)"
