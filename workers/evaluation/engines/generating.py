"""What a model writes after prompts: many rows at once, each leaving when it has ended, new ones taking their
place.

Prompts go in by length, the longest first. Equal ones are read once, and what all of a call begin with is
read once for all. When a quarter of the rows is free the next prompts are read by a pass of their own, and
their cache is joined with that of the rows at work: their answers need not be of the same length for the
device to stay busy. Models whose caches cannot be joined (see `CacheForm.continues`) answer prompts
of equal length, set by set, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from workers.errors import BadInputError
from workers.evaluation.engine import Decoding, Generation
from workers.evaluation.engines.forward import (
    FORWARD_TOKENS,
    WORTH_TOKENS,
    Ids,
    LiveModel,
    common_prefix,
    fill,
)
from workers.evaluation.engines.key_values import drop_columns, join
from workers.evaluation.engines.sampling import Stream, choose
from workers.evaluation.engines.tokenizing import finish

WINDOW_TOKENS = 4
"""A stop text is looked for in as many of the last tokens as it has bytes, and so many more."""


@dataclass
class Answer:
    """A row at work."""

    prompt: int
    """Its number in the call."""
    stream: Stream | None
    most: int
    """Tokens, at most."""
    tokens: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


class Ending:
    """When an answer ends, and what it is then."""

    def __init__(self, tokenizer: Any, decoding: Decoding, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoding = decoding
        self._ends = frozenset(ends)
        longest = max((len(text.encode()) for text in decoding.stop), default=0)
        self._window = longest + WINDOW_TOKENS

    def reached(self, answer: Answer) -> bool:
        """Whether the last token was the last."""
        return (
            answer.tokens[-1] in self._ends
            or len(answer.tokens) >= answer.most
            or self._stopped(answer.tokens)
        )

    def _stopped(self, tokens: list[int]) -> bool:
        stop = self._decoding.stop
        if not stop:
            return False
        seen = self._decode(tokens[-self._window :])
        if not any(text in seen for text in stop):
            return False
        # A tokenizer may write tokens otherwise where others precede them.
        whole = self._decode(tokens)
        return any(text in whole for text in stop)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def result(self, answer: Answer) -> Generation:
        count = len(answer.tokens)
        return finish(
            self._decode(answer.tokens),
            self._decoding.stop,
            answer.tokens[-1] in self._ends,
            count,
            math.fsum(answer.entropies) / count,
        )


@dataclass
class Rows:
    """Answers that are written together."""

    answers: list[Answer]
    cache: Any
    logits: torch.Tensor
    """`[rows, vocabulary]`, of the next token."""
    length: int
    """The cache's columns."""
    padding: list[int]
    """For each row the columns at the left that are not its."""

    def keep(self, numbers: list[int]) -> None:
        """Only these rows stay."""
        if len(numbers) < len(self.answers):
            self.answers = [self.answers[number] for number in numbers]
            self.padding = [self.padding[number] for number in numbers]
            if numbers:
                self.cache.reorder_cache(torch.tensor(numbers, device=self.logits.device))

    def add(self, other: Rows) -> None:
        """Other rows beside these."""
        length = max(self.length, other.length)
        self.padding = [columns + length - self.length for columns in self.padding]
        self.padding += [columns + length - other.length for columns in other.padding]
        self.cache = join(self.cache, other.cache)
        self.logits = torch.cat([self.logits, other.logits])
        self.answers += other.answers
        self.length = length


@dataclass(frozen=True)
class GenerationPlan:
    """The order of a call's prompts. Depends on them alone, so it serves one candidate after the other."""

    prompts: tuple[Ids, ...]
    order: tuple[int, ...]
    prefix: int
    """So many tokens are read once for all prompts."""

    @property
    def weight(self) -> int:
        """How many numbers it holds, about."""
        return sum(map(len, self.prompts))


def plan_generation(live: LiveModel, prompts: Sequence[Ids]) -> GenerationPlan:
    """The plan for these prompts."""
    if not all(map(len, prompts)):
        raise BadInputError(
            "an empty prompt has no token to begin with, as this tokenizer adds none: give each item a prompt"
        )
    live.check_lengths(prompts)
    if live.form.argument is None:
        raise BadInputError(
            f"{type(live.model).__name__} has no cache that answers could be written with: use a task "
            "of kind multiple_choice"
        )
    encoded = [ids.tobytes() for ids in prompts]
    order = sorted(
        range(len(prompts)), key=lambda number: (-len(prompts[number]), encoded[number], number)
    )
    prefix = 0
    if live.form.continues and len(prompts) > 1:
        prefix = min(common_prefix(prompts), min(map(len, prompts)) - 1)
        # Prompts of different length cannot be read together after it.
        passes = 1 + len(set(map(len, prompts)))
        if prefix * (len(set(encoded)) - 1) < WORTH_TOKENS * passes:
            prefix = 0
    return GenerationPlan(tuple(prompts), tuple(order), prefix)


def generate(
    live: LiveModel, plan: GenerationPlan, decoding: Decoding, seeds: Sequence[int], ending: Ending
) -> list[Generation]:
    """Execute a plan with the weights of now; in the order of its prompts."""
    results: dict[int, Generation] = {}
    longest = live.longest or math.inf
    waiting = [
        Answer(
            number,
            Stream(seeds[number]) if decoding.temperature else None,
            int(min(decoding.max_new_tokens, longest - len(plan.prompts[number]))),
        )
        for number in plan.order
    ]
    prefix = None
    if waiting:
        prefix = live.read_prefix(plan.prompts[waiting[0].prompt][: plan.prefix])
    rows: Rows | None = None
    while waiting or rows:
        free = live.rows - (len(rows.answers) if rows else 0)
        if waiting and (rows is None or (live.form.continues and 4 * free >= live.rows)):
            if not live.form.continues:  # nor can it be trusted with padding
                first = len(plan.prompts[waiting[0].prompt])
                free = sum(len(plan.prompts[a.prompt]) == first for a in waiting[:free])
            entering, waiting = waiting[:free], waiting[free:]
            for more in _enter(live, plan, prefix, entering):
                if rows is None:
                    rows = more
                else:
                    rows.add(more)
        assert rows is not None
        _write(live, rows, decoding)
        going = []
        for number, answer in enumerate(rows.answers):
            if ending.reached(answer):
                results[answer.prompt] = ending.result(answer)
            else:
                going.append(number)
        rows.keep(going)
        if not going:
            rows = None
            continue
        _step(live, rows)
    return [results[number] for number in range(len(plan.prompts))]


def _write(live: LiveModel, rows: Rows, decoding: Decoding) -> None:
    """Choose every answer's next token."""
    uniforms = [answer.stream.next() for answer in rows.answers if answer.stream]
    tokens, entropies = choose(rows.logits, decoding, uniforms)
    for answer, token, entropy in zip(rows.answers, tokens, entropies, strict=True):
        answer.tokens.append(token)
        answer.entropies.append(entropy)


def _step(live: LiveModel, rows: Rows) -> None:
    """Read every answer's last token."""
    unused = min(rows.padding) if live.form.continues else 0
    if unused:
        drop_columns(rows.cache, unused)
        rows.length -= unused
        rows.padding = [columns - unused for columns in rows.padding]
    ids = torch.tensor([[answer.tokens[-1]] for answer in rows.answers]).to(live.device)
    padding = torch.tensor(rows.padding).to(live.device) if any(rows.padding) else None
    rows.logits = live.logits(ids, rows.cache, padding=padding)[:, -1]
    rows.length += 1


def _enter(
    live: LiveModel, plan: GenerationPlan, prefix: Any, answers: Sequence[Answer]
) -> Iterator[Rows]:
    """Read the prompts of new answers, in as few passes as can be."""
    by_prompt: dict[bytes, list[Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(plan.prompts[answer.prompt].tobytes(), []).append(answer)
    together = list(by_prompt.values())
    # Between a prefix and what follows it there must not be padding.
    by_length = groupby(
        together, lambda same: len(plan.prompts[same[0].prompt]) if plan.prefix else 0
    )
    for _, several in by_length:
        yield from _read_prompts(live, plan, prefix, list(several))


def _read_prompts(
    live: LiveModel, plan: GenerationPlan, prefix: Any, together: list[list[Answer]]
) -> Iterator[Rows]:
    """`together`: answers to the same prompt, the longest prompts first."""
    longest = len(plan.prompts[together[0][0].prompt]) - plan.prefix
    # Rows that cannot be joined later must be read at once.
    at_once = max(1, FORWARD_TOKENS // longest) if live.form.continues else len(together)
    for first in range(0, len(together), at_once):
        some = together[first : first + at_once]
        ids = [plan.prompts[same[0].prompt] for same in some]
        length = len(ids[0])
        padding = [length - len(one) for one in ids]
        cache = live.after(prefix, len(some))
        logits = live.logits(
            fill([one[plan.prefix :] for one in ids], left=True).to(live.device),
            cache,
            padding=torch.tensor(padding).to(live.device) if any(padding) else None,
        )[:, -1]
        if any(len(same) > 1 for same in some):
            owners = [number for number, same in enumerate(some) for _ in same]
            places = torch.tensor(owners, device=live.device)
            cache.reorder_cache(places)
            logits = logits[places]
            padding = [padding[owner] for owner in owners]
        answers = [answer for same in some for answer in same]
        yield Rows(answers, cache, logits, length, padding)
