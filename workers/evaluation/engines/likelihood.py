"""How likely continuations are: a plan that reads every token as few times as it can, and its execution.

Pairs that share a prompt share its reading: first the prompts, one row each, then what follows them, with
the cache of the prompt copied to every row. The tokens that all prompts of a call begin with are read once
for all. Rows of a pass begin at the same token and are padded at their right, where no token looks: no pass
needs a mask, whatever the model's kind of attention. Therefore prompts of a batch are read together only as
far as the shortest of them goes, and the plan batches prompts of like length.

Only positions that predict a token of a continuation go through the head.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from workers.evaluation.engine import Continuation
from workers.evaluation.engines.forward import (
    FORWARD_TOKENS,
    WORTH_TOKENS,
    Ids,
    LiveModel,
    common_prefix,
    fill,
)

LOGITS_AT_ONCE = 1 << 27
"""Positions times vocabulary of one pass: 0.5 GB in float32."""


@dataclass(frozen=True)
class Group:
    """The pairs of one prompt, or some of them where they are more than is read at once."""

    pairs: tuple[int, ...]
    shared: int
    """So many tokens are the same in all of them, and not predicted."""
    rows: tuple[Ids, ...]
    """What is to be read: without the last token, each text once."""
    row_of: tuple[int, ...]
    """For each pair its row."""

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


@dataclass(frozen=True)
class Batch:
    """What is read in one pass, or in two."""

    prompts: torch.Tensor | None
    """Beginnings, one row for each group; None: nothing is read before the rows."""
    owners: torch.Tensor
    """For each row its group."""
    rows: torch.Tensor
    keep: torch.Tensor
    """The positions of `rows` that predict anything."""
    asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """For each predicted token its row, its position among those kept, and the token."""
    counts: list[tuple[int, int]]
    """(pair, how many tokens of it are predicted), in the order of `asked`."""


@dataclass
class LikelihoodPlan:
    """All passes of a call. Depends on its pairs alone, so it serves one candidate after the other."""

    prefix: Ids
    batches: list[Batch] = field(default_factory=list)
    pairs: int = 0

    @property
    def weight(self) -> int:
        """How many numbers it holds, about."""
        return sum(batch.rows.numel() + 3 * len(batch.asked[0]) for batch in self.batches)


def plan_likelihoods(
    live: LiveModel, wholes: Sequence[Ids], starts: Sequence[int], prompts: Sequence[Any]
) -> LikelihoodPlan:
    """The plan for texts of which the tokens from `starts` on are predicted; `prompts` tell which pairs
    have theirs in common."""
    live.check_lengths(wholes)
    groups = _group(live, wholes, starts, prompts)
    prefix = 0
    if live.form.continues and len(groups) > 1:
        prefix = min(common_prefix(wholes), min(group.shared for group in groups) - 1)
        if prefix * (sum(len(group.rows) for group in groups) - 1) < WORTH_TOKENS:
            prefix = 0
    plan = LikelihoodPlan(wholes[0][:prefix] if wholes else np.zeros(0, np.int64))
    plan.pairs = len(wholes)
    ordered = sorted(groups, key=lambda group: (-group.shared, -group.longest, group.pairs))
    for batch in _batches(live, ordered, prefix):
        plan.batches.append(_prepare(live, batch, prefix, wholes, starts))
    return plan


def _group(
    live: LiveModel, wholes: Sequence[Ids], starts: Sequence[int], prompts: Sequence[Any]
) -> list[Group]:
    by_prompt: dict[Any, dict[bytes, list[int]]] = {}
    for pair, prompt in enumerate(prompts):
        rows = by_prompt.setdefault(prompt, {})
        rows.setdefault(wholes[pair][:-1].tobytes(), []).append(pair)
    groups = []
    for rows in by_prompt.values():
        for some in _fitting(live, list(rows.values()), wholes, starts):
            pairs = [(pair, row) for row, same in enumerate(some) for pair in same]
            groups.append(
                Group(
                    tuple(pair for pair, _ in pairs),
                    min(starts[pair] for pair, _ in pairs),
                    tuple(wholes[same[0]][:-1] for same in some),
                    tuple(row for _, row in pairs),
                )
            )
    return groups


def _fitting(
    live: LiveModel,
    rows: Sequence[Sequence[int]],
    wholes: Sequence[Ids],
    starts: Sequence[int],
) -> Iterator[Sequence[Sequence[int]]]:
    """Rows, each the pairs that it answers, in parts of which each can be read at once."""
    begin = longest = 0
    shared = sys.maxsize
    for number, same in enumerate(rows):
        longest = max(longest, len(wholes[same[0]]) - 1)
        shared = min(shared, *(starts[pair] for pair in same))
        if number > begin and not _fits(live, number + 1 - begin, longest, shared, 0):
            yield rows[begin:number]
            begin, longest = number, len(wholes[same[0]]) - 1
            shared = min(starts[pair] for pair in same)
    yield rows[begin:]


def _fits(live: LiveModel, rows: int, longest: int, shared: int, prefix: int) -> bool:
    """Whether there is room for so many rows in a pass, and for what is predicted behind `shared` tokens."""
    return (
        rows <= live.rows
        and rows * (longest - prefix) <= FORWARD_TOKENS
        and rows * (longest - shared + 1) * live.vocabulary <= LOGITS_AT_ONCE
    )


@dataclass(frozen=True)
class _Cost:
    """Of reading groups together, in tokens."""

    groups: int
    rows: int
    shared: int
    """The least of the groups'."""
    longest: int
    prefix: int
    sharing: bool
    """Whether the model can read on after a prompt."""

    @property
    def saved(self) -> int:
        """By reading prompts before what follows them."""
        return self.sharing * (self.rows - self.groups) * (self.shared - 1 - self.prefix)

    @property
    def tokens(self) -> int:
        alone = self.rows * (self.longest - self.prefix)
        return alone - max(0, self.saved - WORTH_TOKENS)

    def with_group(self, group: Group) -> _Cost:
        return _Cost(
            self.groups + 1,
            self.rows + len(group.rows),
            min(self.shared, group.shared),
            max(self.longest, group.longest),
            self.prefix,
            self.sharing,
        )


def _cost(live: LiveModel, groups: Sequence[Group], prefix: int) -> _Cost:
    first, *rest = groups
    rows, sharing = len(first.rows), live.form.continues
    cost = _Cost(1, rows, first.shared, first.longest, prefix, sharing)
    for group in rest:
        cost = cost.with_group(group)
    return cost


def _batches(live: LiveModel, groups: Sequence[Group], prefix: int) -> list[list[Group]]:
    """Neighbours together as long as that is cheaper than a pass of their own, and there is room."""
    batches: list[list[Group]] = []
    cost = None
    for group in groups:
        alone = _cost(live, [group], prefix)
        if cost is not None:
            both = cost.with_group(group)
            if (
                _fits(live, both.rows, both.longest, both.shared, prefix)
                and both.tokens <= cost.tokens + alone.tokens + WORTH_TOKENS
            ):
                batches[-1].append(group)
                cost = both
                continue
        batches.append([group])
        cost = alone
    return batches


def _prepare(
    live: LiveModel,
    groups: Sequence[Group],
    prefix: int,
    wholes: Sequence[Ids],
    starts: Sequence[int],
) -> Batch:
    cost = _cost(live, groups, prefix)
    begin = prefix  # of the rows
    prompts = None
    if cost.saved >= WORTH_TOKENS:
        begin = cost.shared - 1
        prompts = fill([group.rows[0][prefix:begin] for group in groups])
    rows: list[Ids] = []
    owners: list[int] = []
    asked: list[tuple[int, int, int]] = []
    counts = []
    first = cost.shared - 1  # that predicts anything
    for number, group in enumerate(groups):
        for pair, row in zip(group.pairs, group.row_of, strict=True):
            tokens = wholes[pair][starts[pair] :]
            place = starts[pair] - 1 - first
            asked += [
                (len(rows) + row, place + offset, int(token)) for offset, token in enumerate(tokens)
            ]
            counts.append((pair, len(tokens)))
        rows += [row[begin:] for row in group.rows]
        owners += [number] * len(group.rows)
    device = live.device
    row_numbers, places, tokens = torch.tensor(asked, device=device).T
    return Batch(
        None if prompts is None else prompts.to(device),
        torch.tensor(owners, device=device),
        fill(rows).to(device),
        torch.arange(first - begin, cost.longest - begin, device=device),
        (row_numbers, places, tokens),
        counts,
    )


def loglikelihoods(live: LiveModel, plan: LikelihoodPlan) -> list[Continuation]:
    """Execute a plan with the weights of now; in the order of its pairs."""
    prefix = live.read_prefix(plan.prefix)
    found: list[Continuation | None] = [None] * plan.pairs
    for batch in plan.batches:
        cache = None
        if batch.prompts is not None:
            cache = live.after(prefix, len(batch.prompts))
            live.logits(batch.prompts, cache)
            cache.reorder_cache(batch.owners)
        elif prefix is not None:
            cache = live.after(prefix, len(batch.rows))
        logits = live.logits(batch.rows, cache, batch.keep)
        rows, places, tokens = batch.asked
        normalizers = logits.logsumexp(-1)[rows, places]
        likeliest = logits.argmax(-1)[rows, places]
        logprobs = logits[rows, places, tokens] - normalizers
        # Both in one transfer: each waits for the device.
        both = torch.stack([logprobs.double(), (likeliest == tokens).double()]).tolist()
        at = 0
        for pair, count in batch.counts:
            mine = slice(at, at + count)
            found[pair] = Continuation(math.fsum(both[0][mine]), count, all(both[1][mine]))
            at += count
    return [continuation for continuation in found if continuation is not None]
