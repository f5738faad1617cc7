"""The experts of one layer, some at a time: a layer whose experts are larger than memory, or than one worker.

Prompts stop where they call the layer's experts, with what each was to be given. Then each expert that any
of them has chosen is read once, from the checkpoint's byte ranges, run for all of them, and dropped. The
module's own code runs the experts of a block, as if it had no others, prompt by prompt: so each expert sees
the rows that it sees in the whole model, and gives the same bits whoever holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from workers.diagnostics.expert_outputs import (
    PairOutputs,
    chosen_experts,
    find_experts,
    run_pairs,
    standing_for,
    sums_by_token,
)
from workers.diagnostics.layers import DecoderLayer
from workers.diagnostics.lazy_model import LazyModel

BLOCK_BYTES = 256 << 20
"""Of experts that are in memory at once: ten of Qwen3.5-397B. Layers with fewer bytes are read whole."""


@dataclass(frozen=True, slots=True)
class AskedExperts:
    """What one prompt gives to the experts of a layer."""

    states: torch.Tensor
    """`[tokens, hidden]`"""
    index: torch.Tensor
    """The experts that are chosen for each token, int64 `[tokens, k]`."""

    @property
    def output_bytes(self) -> int:
        """Of what the experts give for each of the pairs."""
        return self.states.nbytes * self.index.shape[-1]


class _ReachedError(Exception):
    """A prompt has come to the experts of the layer."""

    def __init__(self, asked: AskedExperts) -> None:
        self.asked = asked


class LayerExperts:
    """The experts of one layer of a model whose weights are not in memory; see `find_divisible`."""

    def __init__(
        self,
        model: LazyModel,
        stem: str,
        module: torch.nn.Module,
        names: dict[str, str],
        block_bytes: int,
    ) -> None:
        self._model = model
        self.module = module
        self.stem = stem
        """The module's name in the model."""
        self._own = names
        self.names = frozenset(names.values())
        """Of the weights that are read by expert, in the model."""
        self.experts: int = module.num_experts  # type: ignore[assignment]
        self.bytes = sum(getattr(module, own).nbytes for own in names)
        self._block = max(1, block_bytes * self.experts // self.bytes)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """A run of the layer inside ends at its experts, by an exception for `reached_by`."""

        def stop(*arguments: Any, **named: Any) -> torch.Tensor:
            found = chosen_experts(self.module, arguments, named)
            assert found is not None
            raise _ReachedError(AskedExperts(found[0].clone(), found[1].clone()))

        with standing_for(self.module, stop):
            yield

    @staticmethod
    def reached_by(run: Any) -> AskedExperts:
        """What the experts were to be given when `run`, a run of the layer, came to them."""
        try:
            run()
        except _ReachedError as reached:
            return reached.asked
        raise AssertionError("a layer has not called its experts")

    def outputs(
        self, asked: Sequence[AskedExperts], experts: tuple[int, int] | None = None
    ) -> list[torch.Tensor]:
        """What experts `first` to `last - 1` (None: all) give for the pairs of each prompt that are theirs.

        `[pairs, hidden]`, in the order of the pairs (token by token), not weighted. Experts that nobody has
        chosen are not read; at most `BLOCK_BYTES` of them are in memory.
        """
        first, last = experts or (0, self.experts)
        chosen = {expert for one in asked for expert in one.index.reshape(-1).tolist()}
        needed = sorted(expert for expert in chosen if first <= expert < last)
        found = [
            one.states.new_empty(int(is_of(one.index, first, last).sum()), one.states.shape[-1])
            for one in asked
        ]
        cuts = [*range(0, len(needed), self._block), len(needed)]
        for begin, end in pairwise(cuts):
            self._run_block(needed[begin:end], asked, first, last, found)
        return found

    def _run_block(
        self,
        block: list[int],
        asked: Sequence[AskedExperts],
        first: int,
        last: int,
        found: list[torch.Tensor],
    ) -> None:
        """Fill in what the experts of a block give."""
        places = torch.full((self.experts,), -1, dtype=torch.int64, device=self._model.device)
        places[block] = torch.arange(len(block), device=self._model.device)
        with self._holding(block):
            for one, outputs in zip(asked, found, strict=True):
                pairs = is_of(one.index, first, last).nonzero().reshape(-1)
                own = places[one.index.reshape(-1)[pairs]]
                rows = (own >= 0).nonzero().reshape(-1)
                if len(rows):
                    states = one.states[pairs[rows] // one.index.shape[-1]]
                    outputs[rows] = run_pairs(self.module.forward, states, own[rows])

    @contextmanager
    def _holding(self, block: list[int]) -> Iterator[None]:
        """The module as if it had these experts only."""
        module = self.module
        whole = {own: getattr(module, own) for own, _ in module.named_parameters(recurse=False)}
        read = self._model.read_experts(list(self._own.values()), block)
        parts = {own: read[name] for own, name in self._own.items()}
        parts |= {own: w[block] for own, w in whole.items() if own not in parts}
        try:
            module.num_experts = len(block)  # type: ignore[assignment]
            for own, values in parts.items():
                setattr(module, own, torch.nn.Parameter(values, requires_grad=False))
            yield
        finally:
            module.num_experts = self.experts  # type: ignore[assignment]
            for own, values in whole.items():
                setattr(module, own, values)


def find_divisible(
    model: LazyModel, layer: DecoderLayer, block_bytes: int = BLOCK_BYTES
) -> LayerExperts | None:
    """The experts of a layer, if they can be read one by one, and are not in memory.

    So they can where transformers' `grouped_mm` runs them, and every weight has a row for each expert.
    """
    found = find_experts(layer.module)
    if found is None or not sums_by_token(found[1]):
        return None
    name, module = found
    if any(list(child.parameters()) for child in module.children()):
        return None
    stem = f"{layer.name}.{name}"
    weights = dict(module.named_parameters(recurse=False))
    names = {own: f"{stem}.{own}" for own in weights if model.has_experts(f"{stem}.{own}")}
    if not names or any(len(weight) != module.num_experts for weight in weights.values()):
        return None
    if any(not weights[own].is_meta for own in names):
        return None
    return LayerExperts(model, stem, module, names, block_bytes)


def is_of(index: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Which pairs of `index` `[tokens, k]` are of experts `first` to `last - 1`: bool `[tokens * k]`."""
    flat = index.reshape(-1)
    return (flat >= first) & (flat < last)


def put_together(parts: Sequence[tuple[tuple[int, int], torch.Tensor]]) -> PairOutputs:
    """The outputs of all pairs from those of ranges of experts, for `ByPairs`; in any order."""

    def outputs(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        found = states.new_empty(index.numel(), states.shape[-1])
        filled = 0
        for (first, last), own in parts:
            found[is_of(index, first, last)] = own.to(states.device)
            filled += len(own)
        assert filled == len(found), "a prompt has chosen other experts than before"
        return found

    return outputs
