"""What each chosen expert adds for each token, seen in the model's own run of them.

transformers 5 calls a layer's experts as `experts(hidden_states, top_k_index, top_k_weights)` and gets their
weighted sum. Here each *pair*, of a token and one expert that was chosen for it, is made a token of its own
with one expert, so that the same code gives every expert's output by itself, at the cost of the one call
that it replaces. They are then weighted and summed as transformers' `grouped_mm` and `batched_mm` sum them,
so the model's output keeps its bits. Experts that are run in another way (`eager`, or a module of a form of
its own) are run twice, for the model and for the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SUMMED_BY_TOKEN = ("grouped_mm", "batched_mm")
"""Implementations of transformers that give `(outputs * weights).view(tokens, k, hidden).sum(1)`."""

ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")

Keep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes the chosen experts `[tokens, k]`, their weights `[tokens, k]` and the weighted outputs
`[tokens * k, hidden]`."""

PairOutputs = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of hidden states `[tokens, hidden]` and chosen experts `[tokens, k]`: what the experts give, not weighted,
`[tokens * k, hidden]`, token by token."""


class ByPairs:
    """Stands for the `forward` of a layer's experts; see the module's docstring.

    `outputs` gives the pairs' outputs instead of the module, for weights that are not in it. `keep` is told
    of each call. Calls of another form than `ARGUMENTS` go to the module as they are.
    """

    def __init__(self, module: torch.nn.Module, outputs: PairOutputs | None = None) -> None:
        self._module = module
        self._own: Callable[..., torch.Tensor] = module.forward
        self._outputs = outputs
        self.keep: Keep | None = None

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        found = chosen_experts(self._module, arguments, named)
        if found is None:
            return self._own(*arguments, **named)
        states, index, weights = found
        if self._outputs is not None or sums_by_token(self._module):
            pairs = self._outputs(states, index) if self._outputs else self._run(states, index)
            weighted = pairs * weights.reshape(-1, 1)
            output = weighted.view(*index.shape, -1).sum(1).to(states.dtype)
        else:
            repeated = states.repeat_interleave(index.shape[-1], 0)
            weighted = self._own(repeated, index.reshape(-1, 1), weights.reshape(-1, 1))
            output = self._own(*arguments, **named)
        if self.keep is not None:
            self.keep(index, weights, weighted)
        return output

    def _run(self, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        repeated = states.repeat_interleave(index.shape[-1], 0)
        return run_pairs(self._own, repeated, index.reshape(-1))


def run_pairs(
    forward: Callable[..., torch.Tensor], states: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """What expert `experts[n]` gives for row n of `states` `[pairs, hidden]`, as it is."""
    ones = torch.ones(len(experts), 1, dtype=states.dtype, device=states.device)
    return forward(states, experts.reshape(-1, 1), ones)


def sums_by_token(module: torch.nn.Module) -> bool:
    """Whether the module's experts are run, and summed, as `SUMMED_BY_TOKEN` says."""
    config = getattr(module, "config", None)
    ours = hasattr(module, "has_gate")  # what transformers' decorator of such modules sets
    return ours and getattr(config, "_experts_implementation", None) in SUMMED_BY_TOKEN


def chosen_experts(
    module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Hidden states, chosen experts and weights of a call of a layer's experts; None for another form."""
    given = dict(zip(ARGUMENTS, arguments, strict=False)) | named
    states, index, weights = (given.get(name) for name in ARGUMENTS)
    if not isinstance(index, torch.Tensor) or not isinstance(weights, torch.Tensor):
        return None
    if not isinstance(getattr(module, "num_experts", None), int) or states is None:
        return None
    return states, index, weights


def find_experts(layer: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The module that holds a layer's routed experts, with its name in the layer; None of a dense one."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] == "experts":
            return name, module
    return None


@contextmanager
def run_by_pairs(module: torch.nn.Module, keep: Keep) -> Iterator[None]:
    """`keep` is told of the pairs of each call that is made of a layer's experts inside."""
    standing = module.forward
    if isinstance(standing, ByPairs):
        standing.keep = keep
        try:
            yield
        finally:
            standing.keep = None
        return
    with standing_for(module, ByPairs(module)) as standing:
        standing.keep = keep
        yield


@contextmanager
def standing_for(module: torch.nn.Module, forward: Any) -> Iterator[Any]:
    """`forward` is what the module runs, for the block's time."""
    module.forward = forward
    try:
        yield forward
    finally:
        del module.forward
