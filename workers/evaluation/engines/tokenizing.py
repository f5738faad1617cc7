"""What engines share about text: the father's tokenizer, and where tokens and texts end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

from workers.checkpoints import Checkpoint
from workers.diagnostics.lazy_model import ITS_FILES_ALONE, companion_folder, not_loaded
from workers.errors import BadInputError
from workers.evaluation.engine import Chat, Generation, Prompt

TODAY = date(2024, 7, 26)
"""The date of chat templates that write one, as a prompt must not change from day to day: what Llama's
write where they do not know it."""

PINNED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "aAbBdjmyYHMS")
    + " }}{%- endmacro %}\n"
)
"""Before a template: what it asks for the date. transformers takes no function for it, only text."""

EXPRESSED_SHARE = 0.9
"""Of a text's characters, so many must come back from its tokens: normalization may change some."""


def load_tokenizer(father: Checkpoint) -> Any:
    """The tokenizer of a checkpoint, wherever it lies; it pads at the left."""
    import transformers

    try:
        with companion_folder(father) as folder:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, padding_side="left", **ITS_FILES_ALONE
            )
    except (OSError, ValueError) as error:
        raise not_loaded(father.location, "load the tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render(tokenizer: Any, prompt: Prompt) -> tuple[str, bool]:
    """A prompt's text, and whether the tokenizer is to put its own tokens around it.

    A chat template writes them itself. Raises `BadInputError` where there is none.
    """
    if isinstance(prompt, str):
        return prompt, True
    import jinja2

    if not tokenizer.chat_template:
        raise BadInputError(
            "the task asks in conversations (chat: true), and the father's tokenizer has no chat template: "
            "add one, or set chat to false"
        )
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = PINNED_DATE + template
    try:
        text = tokenizer.apply_chat_template(
            messages(prompt), chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        hint = ": leave out the task's key system" if prompt.system else ""
        raise BadInputError(
            f"the chat template of the father's tokenizer refuses a conversation of the task ({error}){hint}"
        ) from error
    return text, False


def messages(chat: Chat) -> list[dict[str, str]]:
    """A conversation as templates and servers want it."""
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    return [*system, {"role": "user", "content": chat.user}]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt. Raises `BadInputError` where there are none."""
    found = _encode(tokenizer, [render(tokenizer, prompt) for prompt in prompts])
    if not all(found):
        raise _empty_prompt()
    return found


def _encode(tokenizer: Any, texts: list[tuple[str, bool]]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own around it or without."""
    found: dict[int, list[int]] = {}
    for adds in (True, False):
        numbers = [number for number, (_, wanted) in enumerate(texts) if wanted == adds]
        if numbers:
            given = [texts[number][0] for number in numbers]
            ids = tokenizer(given, add_special_tokens=adds)["input_ids"]
            found.update(zip(numbers, ids, strict=True))
    return [found[number] for number in range(len(texts))]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[Prompt, str]]
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each (prompt, continuation) in one, and where the continuation's begin.

    Raises `BadInputError` where nothing comes before them.
    """
    before = [render(tokenizer, prompt) for prompt, _ in pairs]
    prompts = _encode(tokenizer, before)
    rests = (continuation for _, continuation in pairs)
    wholes = _encode(
        tokenizer, [(text + rest, adds) for (text, adds), rest in zip(before, rests, strict=True)]
    )
    # A tokenizer may close a text with an end token, and may join prompt and continuation.
    starts = [
        min(common_length(prompt, whole), len(whole) - 1)
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]
    if min(starts) < 1:
        raise _empty_prompt()
    return wholes, starts


def _empty_prompt() -> BadInputError:
    return BadInputError(
        "an empty prompt has no token to begin with, as this tokenizer adds none: give each item a prompt"
    )


def common_length(first: Sequence[str | int], second: Sequence[str | int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    for position, (one, two) in enumerate(zip(first, second, strict=False)):
        if one != two:
            return position
    return min(len(first), len(second))


def finish(
    text: str, stop: Sequence[str], ended: bool, tokens: int, entropy: float = math.nan
) -> Generation:
    """Cut at the first stop text; truncated if neither it nor the model ended the answer."""
    cuts = [text.find(word) for word in stop if word in text]
    if cuts:
        return Generation(text[: min(cuts)], truncated=False, tokens=tokens, entropy=entropy)
    return Generation(text, truncated=not ended, tokens=tokens, entropy=entropy)


def can_express(tokenizer: Any, text: str) -> bool:
    """See `Engine.expresses`."""
    ids = tokenizer(text)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True)
    given, found = (Counter("".join(t.split())) for t in (text, back))
    return (given & found).total() >= EXPRESSED_SHARE * given.total()
