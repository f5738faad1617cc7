"""Whether an engine that loads weights a second time is then the model that it was told to be.

Kernels keep weights in forms of their own, and some builds do not bring new ones into them: no error, and
scores of a model that nobody asked for. Weights that are loaded again unchanged show nothing, as what stays
is what should be there. So the father is given weights whose model is known without running it:

* layers that write nothing, or read nothing: what follows a token then depends on that token alone, and
  both are one model;
* besides, embedding and head negated: nothing changes;
* a head of zeros: every token is as likely as any other.

Afterwards the father must be what he was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from workers.checkpoints import ArchitectureMap
from workers.checkpoints.names import EMBEDDING, HEAD
from workers.errors import BadInputError
from workers.merging import ParentReference, Recipe, Rule, Selector

ADDING = (".o_proj.bias", ".down_proj.bias", ".per_layer_projection.weight")
"""What a layer adds whatever attention and mlp make of its hidden states."""

WRITING = (".o_proj.weight", ".out_proj.weight", ".down_proj.weight", *ADDING)
READING = (
    ".v_proj.weight", ".v_proj.bias",
    ".k_proj.weight",  # Gemma 4 may use keys as values
    ".kv_b_proj.weight",
    ".in_proj_qkv.weight", ".in_proj_qkvz.weight",
    ".up_proj.weight", ".up_proj.bias",
    *ADDING,
)  # fmt: skip
"""Tensors without which layers add nothing: of matrices that kernels fuse with others, at least one."""

ADDING_COMPONENTS = ("attention", "linear_attention", "mlp", "expert", "shared_expert")

CONTEXTS = 8
TOKENS = 12

LEAST_SAME = 1e-3
SHARE_SAME = 0.01
"""Of a model's log-probabilities (nats) that should not differ, so much is the kernels' own: at most the one,
or this share of what they differ by in the father, if that is more."""

NUMERIC_NOISE = 0.02
"""Nats by which two runs of one model may differ: kernels choose the order of their sums."""

Realize = Callable[[Recipe], None]
Logprobs = Callable[[list[list[int]]], list[list[float]]]
"""Of each prompt's tokens behind the first, the log-probability."""


def check_reload(
    father: ArchitectureMap,
    references: Sequence[ParentReference],
    realize: Realize,
    logprobs: Logprobs,
    engine: str,
) -> None:
    """Raise `BadInputError` unless the engine, which has loaded the father by itself, takes new weights."""

    def layers(endings: tuple[str, ...]) -> list[str]:
        return [t.name for t in father.tensors if t.layer is not None and t.name.endswith(endings)]

    def blocks(*endings: str) -> set[tuple[int | None, str]]:
        """What adds to hidden states: (layer, component), of tensors whose names end so."""
        return {
            (t.layer, t.component)
            for t in father.tensors
            if t.layer is not None and t.component in ADDING_COMPONENTS and t.name.endswith(endings)
        }

    known = [blocks(*endings) == blocks("") for endings in (WRITING, READING)]
    if EMBEDDING not in father.by_name or not blocks("") or not all(known):
        raise BadInputError(
            f"{father.location}: its tensors have other names than those by which it is checked whether "
            f"{engine} takes new weights: use engine.kind: transformers"
        )
    head = head_of(father)
    vocabulary = father.by_name[head].shape[0]
    prompts = fixed_prompts(vocabulary)

    def refuse(problem: str) -> BadInputError:
        return BadInputError(
            f"{father.location}: {engine} {problem}: what it scored would not be the candidate. Use "
            "engine.kind: transformers, or another build"
        )

    def logprobs_with(*scaled: tuple[float, list[str]]) -> list[list[float]]:
        """The father's, with some of his tensors multiplied by a number."""
        source = {"source": references[0].name}
        rules = [
            Rule(Selector(names=tuple(names)), "passthrough", source | {"scale": scale})
            for scale, names in scaled
        ]
        try:
            realize(Recipe(tuple(references), tuple(rules)))
        except BadInputError:
            raise
        except Exception as error:  # whatever the kernels of a build may raise
            raise refuse(f"cannot load weights a second time ({error})") from error
        return logprobs(prompts)

    loaded = logprobs(prompts)
    own_spread = spread(loaded)
    same = max(LEAST_SAME, SHARE_SAME * own_spread)
    silent = logprobs_with((0.0, layers(WRITING)))
    for what, found in (("write", silent), ("read", logprobs_with((0.0, layers(READING))))):
        if not spread(found) <= same:
            raise refuse(
                f"keeps old weights: with layers that {what} nothing, what precedes a token still changes "
                f"what follows it (by {spread(found):.3g} nats; in the father by {own_spread:.3g})"
            )
        if not _distance(silent, found) <= same:
            raise refuse(
                "keeps old weights: with layers that read nothing, and with layers that write nothing, it is "
                f"two models ({_distance(silent, found):.3g} nats apart)"
            )
    negated = logprobs_with((0.0, layers(WRITING)), (-1.0, [EMBEDDING, head]))
    if not _distance(silent, negated) <= same:
        raise refuse(
            "keeps old weights: with layers that write nothing, and embedding and head negated, the "
            f"model is another one (by {_distance(silent, negated):.3g} nats)"
        )
    even = [[-math.log(vocabulary)] * (TOKENS - 1)] * CONTEXTS
    if not _distance(logprobs_with((0.0, [head])), even) <= NUMERIC_NOISE:
        raise refuse("keeps old weights: with a head of zeros not all tokens are equally likely")
    again = logprobs_with()
    if not _distance(loaded, again) <= max(NUMERIC_NOISE, same):
        raise refuse(
            f"is another model when it has its first weights again (by {_distance(loaded, again):.3g} nats)"
        )


def head_of(model: ArchitectureMap) -> str:
    """The tensor that tokens are predicted with."""
    return EMBEDDING if model.ties_head or HEAD not in model.by_name else HEAD


def fixed_prompts(vocabulary: int) -> list[list[int]]:
    """`CONTEXTS` sequences of `TOKENS` tokens, which end alike."""
    contexts = [
        [(3 + 7 * number + 5 * place) % vocabulary for place in range(TOKENS - 2)]
        for number in range(CONTEXTS)
    ]
    return [[*context, vocabulary // 3, vocabulary // 2] for context in contexts]


def spread(found: list[list[float]]) -> float:
    """By how much the last token's log-probability depends on the prompt."""
    last = [prompt[-1] for prompt in found]
    return max(last) - min(last)


def _distance(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))
