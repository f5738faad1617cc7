"""What engines share about text: the father's tokenizer, and where tokens and texts end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from workers.checkpoints import Checkpoint
from workers.diagnostics.lazy_model import companion_folder
from workers.errors import BadInputError
from workers.evaluation.engine import Generation

EXPRESSED_SHARE = 0.9
"""Of a text's characters, so many must come back from its tokens: normalization may change some."""


def load_tokenizer(father: Checkpoint) -> Any:
    """The tokenizer of a checkpoint, wherever it lies; it pads at the left."""
    import transformers

    try:
        with companion_folder(father) as folder:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, padding_side="left", local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"{father.location}: transformers cannot load the tokenizer ({error})"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each (prompt, continuation) in one, and where the continuation's begin.

    Raises `BadInputError` where nothing comes before them.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    wholes = tokenizer([prompt + continuation for prompt, continuation in pairs])["input_ids"]
    # A tokenizer may close a text with an end token, and may join prompt and continuation.
    starts = [
        min(common_length(prompt, whole), len(whole) - 1)
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]
    if min(starts) < 1:
        raise BadInputError(
            "an empty prompt has no token to begin with, as this tokenizer adds none: give each item "
            "a prompt"
        )
    return wholes, starts


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    for position, (one, two) in enumerate(zip(first, second, strict=False)):
        if one != two:
            return position
    return min(len(first), len(second))


def finish(text: str, stop: Sequence[str], ended: bool) -> Generation:
    """Cut at the first stop text; truncated if neither it nor the model ended the answer."""
    cuts = [text.find(word) for word in stop if word in text]
    if cuts:
        return Generation(text[: min(cuts)], truncated=False)
    return Generation(text, truncated=not ended)


def can_express(tokenizer: Any, text: str) -> bool:
    """See `Engine.expresses`."""
    ids = tokenizer(text)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True)
    given, found = (Counter("".join(t.split())) for t in (text, back))
    return (given & found).total() >= EXPRESSED_SHARE * given.total()
