"""How a search stands within a budget: what is paid for, how much of it has ended, and the best of it.

Kept up as records come, so that asking costs nothing however many candidates there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.ledger.state import CampaignState, Candidate


class Standing:
    """Follows a state for one budget. `update` takes in what has happened since the last time."""

    def __init__(self, state: CampaignState, budget: int) -> None:
        self._state = state
        self._budget = budget
        self.rewinds = state.rewinds
        """If the state's is another one, this is of a past that no longer counts."""
        self.best: tuple[Candidate, float] | None = None
        self._counts: list[int] = []
        """Of each generation, how many of its candidates are paid for: the first so many."""
        self._considered = 0
        """Generations before the one at which the budget was spent, and that one."""
        self._spent: set[int] = set()
        """Rounds of breeding that have spent theirs."""
        self._first: dict[str, Candidate] = {}
        """Recipe -> the candidate that was the first to ask for it; in that order."""
        self._place: dict[str, int] = {}
        """Recipe -> its place in that order."""
        self._best_place = 0
        self._settled: set[str] = set()
        self._given_up: set[str] = set()
        self._ended = 0
        """So many of the state's `endings` are taken in."""

    @property
    def settled(self) -> int:
        """Different candidates that were scored, told apart by a race, or have failed."""
        return len(self._settled)

    @property
    def given_up(self) -> int:
        """How many of them have failed."""
        return len(self._given_up)

    def update(self) -> None:
        """Take in what the state has got since."""
        state = self._state
        for number in range(len(self._counts), len(state.generations)):
            self._pay(state.generations[number], state.round_of[number])
        for place in range(self._ended, len(state.endings)):
            if state.endings[place] in self._first:
                self._look_at(state.endings[place])
        self._ended = len(state.endings)

    def paid(self) -> list[list[Candidate]]:
        """The candidates of each generation that the budget pays for."""
        return [self.paid_of(number) for number in range(self._considered)]

    def paid_of(self, number: int) -> list[Candidate]:
        """Those of one generation."""
        if number >= self._considered:
            return []
        return self._state.generations[number][: self._counts[number]]

    def _pay(self, asked: list[Candidate], round_number: int) -> None:
        own = self._state.rounds.get(round_number, {})
        limit = min(self._budget, own.get("limit", self._budget))
        self._counts.append(0)
        if round_number in self._spent:
            return
        self._considered = len(self._counts)
        for candidate in asked:
            recipe = candidate.recipe_id
            if recipe not in self._first:
                if len(self._first) >= limit:
                    self._spent.add(round_number)
                    return
                self._place[recipe] = len(self._first)
                self._first[recipe] = candidate
                self._look_at(recipe)
            self._counts[-1] += 1

    def _look_at(self, recipe: str) -> None:
        """See what has become of a recipe that is paid for."""
        if not self._state.is_settled(recipe):
            return
        self._settled.add(recipe)
        if self._state.evaluation(recipe, "search").failed is not None:
            self._given_up.add(recipe)
        fitness, place = self._state.fitness(recipe), self._place[recipe]
        if fitness is None:
            return
        # Of equals the one that was asked for first, whichever ended first.
        if self.best is None or (fitness, -place) > (self.best[1], -self._best_place):
            self.best, self._best_place = (self._first[recipe], fitness), place
