"""Three-stage evaluation: ask once, ask again where that was not enough, and break close ties.

Source: the model card of Darwin-28B-Opus, which has it in two forms. Its results are from the one that asks
again where the gold label says that the answer is wrong; its usage section says "low-confidence" instead.
How many samples a tie is broken with, when it is close, what the threshold of confidence is, and which
answer wins a tie are not published: these are our choice, and parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.errors import BadInputError
from workers.evaluation.engine import Engine
from workers.evaluation.protocols.turning import turn_choices
from workers.evaluation.protocols.voting import (
    Ballot,
    ProtocolResult,
    Question,
    ask,
    greedily,
    more_samples,
    sample_seed,
    sampling,
    to_result,
)
from workers.evaluation.scoring import score_answer
from workers.evaluation.task import Item, Task

SIGNALS = ("entropy", "margin")


@dataclass(frozen=True)
class ConfidenceRetry:
    """Ask again where the model is in doubt; all answers vote, the first one too."""

    name = "confidence_retry"
    uses_gold_labels = False
    signal: str = "entropy"
    """What doubt is: `entropy`, of the first answer's tokens (nats, their mean); or `margin`, 1 - the
    lead of the most frequent one of the first answers, as a share of these."""
    threshold: float | None = None
    """Doubt from which on an item is asked again."""
    dev_items: int = 0
    """Instead of `threshold`: it is fixed for each task on so many of its search items."""
    first_samples: int = 1
    """Answers of stage 1: a greedy one and samples; more than one only for `margin`."""
    samples: int = 8
    """Answers after stage 2, with those of stage 1."""
    temperature: float = 0.7
    close: int = 1
    """Stage 3 is for votes that are won by so many or fewer."""
    tie_samples: int = 4
    """Answers that stage 3 adds."""
    permute: bool = True
    """Whether stage 3 moves the choices of a multiple-choice prompt one letter further for each answer; after
    as many answers as there are choices, each has stood behind each letter once."""
    seed: int = 0
    thresholds: dict[str, float] = field(default_factory=dict, compare=False)
    """Task -> the threshold that was fixed for it."""

    def threshold_for(self, task: Task) -> float | None:
        """The threshold; None while it is not fixed."""
        return self.thresholds.get(task.name, self.threshold)


@dataclass(frozen=True)
class OracleRetry:
    """Ask again where the answer is wrong by the gold label. For comparison with published numbers alone."""

    name = "oracle_retry"
    uses_gold_labels = True
    samples: int = 8
    """Answers that stage 2 votes over, without that of stage 1."""
    temperature: float = 0.7
    close: int = 1
    tie_samples: int = 4
    permute: bool = False
    seed: int = 0


def retry_by_doubt(
    engine: Engine, task: Task, items: Sequence[Item], protocol: ConfidenceRetry
) -> list[ProtocolResult]:
    """`confidence_retry`; without a threshold its first stage alone."""
    ballots = [Ballot(item) for item in items]
    ask(engine, task, more_samples(ballots, protocol.seed, 1, lambda ballot: 1), greedily(task))
    hot = sampling(task, protocol.temperature)
    again = more_samples(ballots, protocol.seed, 1, lambda ballot: protocol.first_samples - 1)
    ask(engine, task, again, hot)
    doubts = [_doubt(ballot, protocol.signal) for ballot in ballots]
    stages = [[_score(task, ballot)] for ballot in ballots]
    threshold = protocol.threshold_for(task)
    if threshold is not None:
        doubtful = [n for n, doubt in enumerate(doubts) if doubt >= threshold]
        asked = [ballots[n] for n in doubtful]
        missing = more_samples(asked, protocol.seed, 2, lambda b: protocol.samples - len(b.answers))
        ask(engine, task, missing, hot)
        for n in doubtful:
            stages[n].append(_score(task, ballots[n]))
        tied = [n for n in doubtful if ballots[n].lead <= protocol.close]
        ask(engine, task, _break_ties(task, [ballots[n] for n in tied], protocol), hot)
        for n in tied:
            stages[n].append(_score(task, ballots[n]))
    return [
        to_result(ballot, passed, doubt)
        for ballot, passed, doubt in zip(ballots, stages, doubts, strict=True)
    ]


def retry_by_gold(
    engine: Engine, task: Task, items: Sequence[Item], protocol: OracleRetry
) -> list[ProtocolResult]:
    """`oracle_retry`. An answer that is right is never asked for again, so none is ever lost."""
    ballots = [Ballot(item) for item in items]
    ask(engine, task, more_samples(ballots, protocol.seed, 1, lambda ballot: 1), greedily(task))
    stages = [[_score(task, ballot)] for ballot in ballots]
    hot = sampling(task, protocol.temperature)
    wrong = [n for n in range(len(items)) if stages[n][-1] < 1]
    for n in wrong:
        ballots[n].first = len(ballots[n].answers)
    asked = [ballots[n] for n in wrong]
    ask(engine, task, more_samples(asked, protocol.seed, 2, lambda b: protocol.samples), hot)
    for n in wrong:
        stages[n].append(_score(task, ballots[n]))
    tied = [n for n in wrong if stages[n][-1] < 1 and ballots[n].lead <= protocol.close]
    ask(engine, task, _break_ties(task, [ballots[n] for n in tied], protocol), hot)
    for n in tied:
        stages[n].append(_score(task, ballots[n]))
    return [to_result(ballot, passed) for ballot, passed in zip(ballots, stages, strict=True)]


def _score(task: Task, ballot: Ballot) -> float:
    winner = ballot.winner
    return 0.0 if winner is None else score_answer(task, ballot.item, winner)


def _doubt(ballot: Ballot, signal: str) -> float:
    """How much the model doubts its first answer; beyond any threshold if it gave none."""
    if ballot.winner is None:
        return math.inf
    if signal == "margin":
        return 1 - ballot.margin
    entropy = ballot.generations[0].entropy
    if math.isnan(entropy):
        raise BadInputError(
            "this engine does not tell the entropy of what it writes: let confidence_retry go by the votes "
            "(--parameter signal=margin)"
        )
    return entropy


def _break_ties(
    task: Task, ballots: Sequence[Ballot], protocol: ConfidenceRetry | OracleRetry
) -> list[Question]:
    questions = []
    for ballot in ballots:
        for number in range(protocol.tie_samples):
            seed = sample_seed(protocol.seed, ballot.item, 3, number)
            # The first of them in another order already: stage 2 has asked in the item's own.
            turned = turn_choices(task, ballot.item, number + 1) if protocol.permute else None
            prompt, read = turned or (ballot.item.prompt, None)
            questions.append(Question(ballot, prompt, seed, read))
    return questions
