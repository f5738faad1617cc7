"""How a mixture of experts routes tokens: how often each expert is chosen, and with what weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from workers.diagnostics.layers import DecoderLayer


@dataclass
class Routing:
    """What a layer did with some tokens; E experts, k of them chosen for each token."""

    tokens: int
    per_token: int
    choices: torch.Tensor
    """How often each expert was chosen, int64 `[E]`."""
    weights: torch.Tensor
    """The sum of the weights that it then had, float64 `[E]`."""

    def add(self, other: Routing) -> None:
        """Take in what the same layer did with other tokens."""
        self.tokens += other.tokens
        self.choices += other.choices
        self.weights += other.weights

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `choices` and `weights` (means over the tokens) of each expert."""
        return {
            "tokens": self.tokens,
            "per_token": self.per_token,
            "choices": self.choices.tolist(),
            "weights": (self.weights / self.tokens).tolist(),
        }


@contextmanager
def routed(layers: tuple[DecoderLayer, ...]) -> Iterator[dict[int, Routing]]:
    """What the layers that have experts do in the run that is made inside, by layer.

    They are seen where the chosen experts are called: `experts(hidden_states, top_k_index, top_k_weights)`,
    which all mixtures of transformers 5 share; those of another form are passed over.
    """
    seen: dict[int, Routing] = {}

    def hook(layer: int) -> Any:
        def keep(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = dict(
                zip(("hidden_states", "top_k_index", "top_k_weights"), arguments, strict=False)
            )
            given |= named
            index, weights = given.get("top_k_index"), given.get("top_k_weights")
            experts = getattr(module, "num_experts", None)
            if index is None or weights is None or not isinstance(experts, int):
                return
            chosen, weights = index.reshape(-1).cpu(), weights.reshape(-1).double().cpu()
            sums = torch.zeros(experts, dtype=torch.float64).index_add_(0, chosen, weights)
            counts = torch.bincount(chosen, minlength=experts)
            seen[layer] = Routing(index.shape[0], index.shape[-1], counts, sums)

        return keep

    handles = [
        module.register_forward_pre_hook(hook(layer.index), with_kwargs=True)
        for layer in layers
        for name, module in layer.module.named_modules()
        if name.rpartition(".")[2] == "experts"
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
