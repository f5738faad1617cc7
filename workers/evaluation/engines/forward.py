"""One pass of a live model over a batch of tokens, and what tells batches how large they may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from workers.errors import BadInputError
from workers.evaluation.engines.key_values import CacheForm, repeat

Ids = np.ndarray[Any, np.dtype[np.int64]]
"""The token ids of a text."""

FORWARD_TOKENS = 16384
"""Of one pass, all rows together: enough for any device to be busy, and a bound for its memory."""

WORTH_TOKENS = 64
"""So many tokens saved are worth a pass of their own."""


POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
"""Modules and buffers that have a row for each position (GPT-2, GPT-J, OPT)."""


class LiveModel:
    """A model whose weights change, and how it is called. Nothing is kept from one call to the next."""

    def __init__(self, model: Any, device: torch.device, rows: int) -> None:
        self.model = model
        self.device = device
        self.rows = rows
        """At once, at most."""
        self.form = CacheForm(model)
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.longest = _positions(model)
        """Tokens of the longest text that it can read; None if nothing limits them."""

    def check_lengths(self, texts: Iterable[Ids]) -> None:
        """Raise `BadInputError` for a text that has no position left for one more token."""
        longest = max(map(len, texts), default=0)
        if self.longest is not None and longest >= self.longest:
            raise BadInputError(
                f"{type(self.model).__name__}: a text has {longest} tokens, and with one more it must fit "
                f"into the {self.longest} positions of the model: leave the item out"
            )

    def logits(
        self,
        ids: torch.Tensor,
        cache: Any = None,
        keep: int | torch.Tensor = 1,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read tokens `[rows, length]` after those in the cache, which then holds them, too.

        `keep`: how many of the last positions get logits, or which. `padding` `[rows]`: how many columns at
        the left of cache and tokens, together, are padding. Float32 `[rows, kept, vocabulary]`.
        """
        given: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if cache is not None:
            given[self.form.argument or ""] = cache
        before = 0
        if cache is not None and self.form.argument == "past_key_values":
            before = cache.get_seq_length()
        columns = torch.arange(before + ids.shape[1], device=ids.device)
        positions = columns[None, before:]
        if padding is not None:
            given["attention_mask"] = (columns >= padding[:, None]).long()
            positions = (positions - padding[:, None]).clamp(min=0)
        # Some models (Bamba) begin to count anew after a cache, if they are not told.
        if self.form.takes_positions and (before or padding is not None):
            given["position_ids"] = positions
        if self.form.takes_kept:
            given["logits_to_keep"] = keep
        found: torch.Tensor = self.model(**given).logits
        if not self.form.takes_kept:
            found = found[:, -keep:] if isinstance(keep, int) else found[:, keep]
        return found.float()

    def read_prefix(self, ids: Ids) -> Any:
        """The cache after one text, of one row; None if it is empty."""
        if not len(ids):
            return None
        cache = self.form.make()
        self.logits(torch.from_numpy(ids[None]).to(self.device), cache)
        return cache

    def after(self, prefix: Any, rows: int) -> Any:
        """A cache for rows that come after a prefix; empty where there is none."""
        if prefix is None:
            return self.form.make() if self.form.argument else None
        return repeat(prefix, rows, self.device)


def _positions(model: Any) -> int | None:
    """How many positions the model has a table of; None if it has none."""
    parts = [name for name, _ in (*model.named_modules(), *model.named_buffers())]
    if not any(name.rpartition(".")[2] in POSITION_TABLES for name in parts):
        return None
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fill(rows: Sequence[Ids], left: bool = False) -> torch.Tensor:
    """`[rows, length]` on the CPU, padded with zeros at the right, or left."""
    length = max(map(len, rows))
    filled = np.zeros((len(rows), length), dtype=np.int64)
    for number, ids in enumerate(rows):
        filled[number, length - len(ids) if left else 0 :][: len(ids)] = ids
    return torch.from_numpy(filled)


def common_prefix(texts: Sequence[Ids]) -> int:
    """How many tokens all texts have in common at their beginning."""
    encoded = [ids.tobytes() for ids in texts]
    # What the first and the last in alphabetical order share, all between them share.
    first, last = (np.frombuffer(text, dtype=np.int64) for text in (min(encoded), max(encoded)))
    shorter = min(len(first), len(last))
    different = np.flatnonzero(first[:shorter] != last[:shorter])
    return int(different[0]) if len(different) else shorter
