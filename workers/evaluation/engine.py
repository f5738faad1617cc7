"""The engine interface: a live model that can become any child, and be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from workers.merging import Recipe


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a model likes a continuation of a prompt."""

    logprob: float
    """Sum of the log-probabilities (nats) of the continuation's tokens."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote after a prompt."""

    text: str
    truncated: bool
    """Whether the token limit ended it, not the model or a stop text."""


class Engine(Protocol):
    """A live model. One batch a call: the caller decides what is computed together."""

    def realize(self, recipe: Recipe) -> None:
        """Give the live weights the values that the recipe's written child would have."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """For each (prompt, continuation), how likely the continuation is."""

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Generation]:
        """Greedy continuations."""

    def describe(self, prompt: str) -> dict[str, Any]:
        """What scores depend on besides weights and items: versions, dtype, device kind, threads, and
        how `prompt` is tokenized. Two engines may share a campaign only if these are equal."""
