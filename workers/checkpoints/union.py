"""The tokens of a union that its father does not have: which can be appended to his tokenizer, and how.

They become added tokens, which tokenizers looks for in a text before the father's own model sees it. So
a text that contains none of them is encoded as before; where the text of one stands, it is that token,
also inside of words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from workers.checkpoints.tokenizer_files import with_added
from workers.checkpoints.tokens import FLAGS, TOKENIZER_FILE, Token, Tokens
from workers.errors import BadInputError


def appended_tokens(
    tokens: dict[str, Tokens], rows: dict[str, int], father: str
) -> tuple[list[Token], dict[bytes, str]]:
    """The tokens that a union appends to the father's, and the text -> reason of those that cannot be.

    `tokens` and `rows` (of the embedding) are per checkpoint, in the order in which the checkpoints are
    asked. Raises `BadInputError` if nothing can be appended to the father's tokenizer.
    """
    own = tokens[father]
    known = {token.text for token in own.entries}
    spellings = {token.content.encode("utf-8", "surrogatepass") for token in own.entries}
    reasons: dict[bytes, str] = {}
    wanted: dict[bytes, Token] = {}
    for name in [name for name in tokens if name != father]:
        for token in tokens[name].entries:
            if token.text in known or token.text in wanted:
                continue
            reason = _why_not(token, rows[name], spellings)
            if reason is None:
                wanted[token.text] = token
                reasons.pop(token.text, None)
            else:
                reasons.setdefault(token.text, reason)
    first = 1 + max((token.id for token in own.entries), default=-1)
    unusable = _unusable(own, _numbered(wanted.values(), first))
    reasons |= {content.encode(): reason for content, reason in unusable.items()}
    usable = [token for token in wanted.values() if token.text.decode() not in unusable]
    return _numbered(usable, first), reasons


def _why_not(token: Token, rows: int, spellings: set[bytes]) -> str | None:
    """Why a token cannot be appended to a tokenizer that spells its own so; None if it can."""
    if token.id >= rows:
        return "it has no row"
    if not token.text:
        return "it is empty"
    try:
        token.text.decode()
    except UnicodeDecodeError:
        return "it is no text, but a part of a character"
    if token.text in spellings:
        return "its text is the spelling of another token of the father"
    return token.fragment


def _numbered(tokens: Iterable[Token], first: int) -> list[Token]:
    """The tokens as added ones, spelt as the text that they stand for, with ids from `first` on."""
    never = dict.fromkeys(FLAGS, False)
    return [
        Token(
            number, token.text.decode(), token.text, never if token.flags is None else token.flags
        )
        for number, token in enumerate(tokens, first)
    ]


def _unusable(father: Tokens, appended: list[Token]) -> dict[str, str]:
    """Which of the tokens do not work behind the father's, and why.

    A token works if its own text is encoded as this token alone, and decoded as its text. (A byte-level
    decoder takes `été` for three bytes, as it takes all that is spelt in its alphabet.) Raises
    `BadInputError` if the father's tokenizer numbers them otherwise.
    """
    if not appended:
        return {}
    from tokenizers import Tokenizer

    where = f"{father.location}/{TOKENIZER_FILE}"
    try:
        tokenizer = Tokenizer.from_str(json.dumps(with_added(father.definition, appended)))
    except Exception as error:  # what tokenizers raises has no class of its own
        raise BadInputError(f"{where}: tokenizers cannot load it ({error})") from error
    ids: dict[str, set[int]] = {}
    for token in (*father.entries, *appended):
        ids.setdefault(token.content, set()).add(token.id)
    for content, numbers in ids.items():
        if (found := tokenizer.token_to_id(content)) not in numbers:
            raise BadInputError(
                f"{where}: token {content!r} would be {found} and not {min(numbers)} once others are "
                "appended: the ids have gaps, so this cannot be the father of a union; choose `base` "
                "or a parent's name"
            )
    reasons = {}
    for token in appended:
        encoded = tokenizer.encode(token.content, add_special_tokens=False).ids
        if encoded != [token.id]:
            reasons[token.content] = "the father's tokenizer would not find it in its own text"
        elif tokenizer.decode(encoded, skip_special_tokens=False) != token.content:
            reasons[token.content] = "the father's tokenizer would not spell it as its text"
    return reasons
