"""The child's vocabulary where the parents have different ones: its tokens, and whose rows they are.

An embedding and a head have one row per token id. Parents with other tokenizers have other tokens at
the same ids, so their rows are brought into the child's order, by what the tokens stand for, before
anything is merged. Nothing is cut in silence: a token that is not in the child is in `left_out`, with
the reason.

The child's rows are, in this order:

* the owner's tokens at their own ids (the owner is the father for `union`);
* for `union`, what the other parents, and last the base, know beyond them, in parent and id order. These
  take the ids behind the father's tokens, as tokenizers will number them, so first the father's padding
  rows (rows that no token has) and then new rows;
* the owner's padding rows that are left. If a union has outgrown the father's rows, their number is
  rounded up to a multiple of 64; these extra rows hold the mean of the father's rows, whose logit never
  exceeds that of every token (that of a row of zeros may).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from workers.checkpoints.checkpoint import Checkpoint
from workers.checkpoints.names import canonical_name
from workers.checkpoints.tokenizer_files import (
    TOKENIZER_FILES,
    appended_files,
    json_bytes,
    remapped_ids,
)
from workers.checkpoints.tokens import Token, Tokens, read_tokens
from workers.checkpoints.union import appended_tokens
from workers.errors import BadInputError

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

UNION, BASE = "union", "base"

ROW_MULTIPLE = 64
"""Rows of a union that outgrew the father's: matrix products like round sizes."""

ROW_KEYS = ("vocab_size", "vocab_size_per_layer_input")
"""Keys of a configuration that say the number of rows."""

EMBEDDING = "embed_tokens.weight"

TOKEN_INDEXED = re.compile(
    r"((mtp|layers\.\d+)\.)?"  # the copies that layers of multi-token prediction keep
    r"(embed_tokens|embed_tokens_per_layer|lm_head|shared_head\.head)\.(weight|bias)"
)


def is_token_indexed(name: str) -> bool:
    """Whether a tensor, by its canonical name, has one row (an element of dimension 0) per token id."""
    return TOKEN_INDEXED.fullmatch(name) is not None


@dataclass(frozen=True)
class ChildVocabulary:
    """The tokens of a child, and where in each checkpoint their rows are."""

    owner: str
    """The checkpoint that the tokenizer is from."""
    rows: int
    """Rows of each token-indexed tensor of the child."""
    maps: dict[str, NDArray[int64]]
    """Checkpoint (`base` for the base) -> its own row for each row of the child, -1 where it has none."""
    left_out: dict[str, dict[str, str]]
    """Checkpoint -> each of its tokens that is not in the child, and why."""
    companions: dict[str, bytes]
    """Small files that take the place of the father's. `config.json` is not among them."""
    removed: frozenset[str]
    """Small files of the father that the child must not have: they speak of another tokenizer."""
    appended: tuple[Token, ...] = ()
    """What a union puts behind the father's tokens."""
    _father_ids: dict[int, int | None] | None = None
    """Id of a father's token -> that of the same token in the child; None: all keep their ids."""
    _owner_config: dict[str, Any] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What whoever asked for this vocabulary should know of it."""
        found = []
        words = [token.content for token in self.appended if not (token.flags or {}).get("special")]
        if words:
            found.append(
                f"the union adds {len(words)} words to the father's tokenizer, {words[0]!r} the first: "
                "a text in which one stands, also inside of a word, is encoded otherwise than by the "
                "father"
            )
        for name, tokens in self.left_out.items():
            for token, reason in list(tokens.items())[:1]:
                more = f" (and {len(tokens) - 1} others)" if len(tokens) > 1 else ""
                found.append(f"{name}: {token!r}{more} is not in the child: {reason}")
        return found

    def config_changes(self, config: dict[str, Any]) -> dict[str, Any]:
        """The father's configuration with the child's number of rows and ids of special tokens.

        Raises `BadInputError` if a special token that it names is not in the child.
        """
        changed = config
        if self._father_ids is not None:
            changed = remapped_ids(config, self._father_ids, self._owner_config, "config.json")
        return _with_rows(changed, self.rows)


def child_vocabulary(
    parents: dict[str, Checkpoint], base: Checkpoint | None, choice: str
) -> ChildVocabulary:
    """The vocabulary of a child of `parents`, the father first, as a recipe's `vocabulary` chooses it.

    `choice`: `union` (the father's tokens and those that only others know), `base`, or a parent's name.
    Raises `BadInputError` for a checkpoint whose tokenizer or rows cannot be used.
    """
    checkpoints = parents | ({BASE: base} if base is not None else {})
    father = next(iter(parents))
    owner = father if choice == UNION else choice
    if owner not in checkpoints:
        raise BadInputError(f"vocabulary: {choice!r}: the recipe has no such checkpoint")
    rows = {name: token_rows(checkpoint) for name, checkpoint in checkpoints.items()}
    tokens = {name: read_tokens(checkpoint) for name, checkpoint in checkpoints.items()}
    appended, reasons = appended_tokens(tokens, rows, father) if choice == UNION else ([], {})
    entries = (*tokens[owner].entries, *appended)
    most = rows[owner]
    needed = 1 + max((token.id for token in entries), default=-1)
    if choice == UNION and needed > most:
        most = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    known = {token.text for token in entries}
    maps = {
        name: _row_map(name == owner, tokens[name], rows[name], entries, most, rows[owner])
        for name in checkpoints
    }
    left_out = {
        name: {
            token.content: reasons.get(token.text, f"{owner} does not have it")
            for token in own.entries
            if token.text not in known
        }
        for name, own in tokens.items()
    }
    vocabulary = ChildVocabulary(owner, most, maps, left_out, {}, frozenset(), tuple(appended))
    if owner == father:
        if not appended:
            return vocabulary
        files = appended_files(checkpoints[father], tokens[father].definition, appended)
        return replace(vocabulary, companions=files)
    ids = _new_ids(tokens[father], entries, maps[father])
    defaults = _flat(checkpoints[owner].config)
    files, removed = _owner_files(checkpoints[owner], checkpoints[father], ids, defaults)
    return replace(
        vocabulary, companions=files, removed=removed, _father_ids=ids, _owner_config=defaults
    )


def token_rows(checkpoint: Checkpoint) -> int:
    """Rows of a checkpoint's token-indexed tensors. Raises `BadInputError` if they do not agree."""
    found = {
        canonical_name(entry.name): entry.shape[0]
        for entry in checkpoint.tensors.values()
        if entry.shape and is_token_indexed(canonical_name(entry.name))
    }
    if EMBEDDING not in found:
        raise BadInputError(
            f"{checkpoint.location}: no tensor {EMBEDDING}: vocabularies can be mapped only for "
            "models that name their embedding so"
        )
    for name, count in found.items():
        if count != found[EMBEDDING]:
            raise BadInputError(
                f"{checkpoint.location}: {name} has {count} rows but {EMBEDDING} {found[EMBEDDING]}: "
                "such a vocabulary cannot be mapped; take parents of one tokenizer, and no "
                "`vocabulary` in the recipe"
            )
    return found[EMBEDDING]


def _row_map(
    is_owner: bool,
    tokens: Tokens,
    own_rows: int,
    entries: tuple[Token, ...],
    rows: int,
    owner_rows: int,
) -> NDArray[int64]:
    """The checkpoint's row for each of the child's `rows`; -1 where it has none."""
    import numpy

    found = numpy.full(rows, -1, numpy.int64)
    # Rows that no token has, neither here nor in the child, stay what they are.
    padding = numpy.ones(min(own_rows, rows, owner_rows), bool)
    for token in tokens.entries:
        if token.id < len(padding):
            padding[token.id] = False
    found[: len(padding)][padding] = numpy.flatnonzero(padding)
    taken = {token.id for token in tokens.entries}
    # Rows of one text: a tokenizer may have both an added token and one of its model's for it.
    ids: dict[bytes, dict[str, int]] = {}
    for token in tokens.entries:
        if token.id < own_rows:
            ids.setdefault(token.text, {})[token.content] = token.id
    for token in entries:
        if token.id >= rows:
            continue
        if is_owner:
            known = token.id if token.id in taken and token.id < own_rows else -1
        else:
            same = ids.get(token.text, {})
            known = same.get(token.content, next(iter(same.values()), -1))
        found[token.id] = known
    return found


def _new_ids(
    father: Tokens, entries: tuple[Token, ...], father_map: NDArray[int64]
) -> dict[int, int | None]:
    """Id of each father's token -> its id in the child, None if it is not there; and of each padding
    row that the child keeps."""
    ids: dict[bytes, int] = {}
    for token in entries:
        ids.setdefault(token.text, token.id)
    rows = enumerate(father_map.tolist())
    kept: dict[int, int | None] = {own: row for row, own in rows if own >= 0}
    return kept | {token.id: ids.get(token.text) for token in father.entries}


def _owner_files(
    owner: Checkpoint,
    father: Checkpoint,
    father_ids: dict[int, int | None],
    defaults: dict[str, Any],
) -> tuple[dict[str, bytes], frozenset[str]]:
    """The owner's tokenizer files, and the names of the father's that have no counterpart."""
    files = {
        name: owner.store.read(name) for name in owner.companions if TOKENIZER_FILES.fullmatch(name)
    }
    removed = frozenset(
        name for name in father.companions if TOKENIZER_FILES.fullmatch(name) and name not in files
    )
    name = "generation_config.json"
    generation, own = father.read_json(name), owner.read_json(name)
    if isinstance(generation, dict):
        defaults = defaults | (own if isinstance(own, dict) else {})
        files[name] = json_bytes(remapped_ids(generation, father_ids, defaults, name))
    return files, removed


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration and the text part that it may have as one table, without what is None."""
    text = config.get("text_config")
    tables = [text if isinstance(text, dict) else {}, config]
    return {key: value for table in tables for key, value in table.items() if value is not None}


def _with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """The configuration with this number of rows wherever it says one, and at least once."""
    changed = config | {key: rows for key in ROW_KEYS if key in config}
    text = config.get("text_config")
    if isinstance(text, dict):
        keys = {"vocab_size"} | {key for key in ROW_KEYS if key in text}
        changed["text_config"] = text | dict.fromkeys(keys, rows)
    else:
        changed["vocab_size"] = rows
    return changed
