"""How a mixture of experts routes tokens, and what its experts add for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from workers.diagnostics.expert_outputs import find_experts, run_by_pairs
from workers.diagnostics.layers import DecoderLayer
from workers.diagnostics.routers import (
    OtherRouters,
    find_router,
    has_softmax,
    load_entropy,
    observed_router,
    overlap,
    token_entropies,
)


@dataclass
class Routing:
    """What a layer did with some tokens; E experts, k of them chosen for each token."""

    tokens: int
    per_token: int
    choices: torch.Tensor
    """How often each expert was chosen, int64 `[E]`."""
    weights: torch.Tensor
    """The sum of the weights that it then had, float64 `[E]`."""
    norms: torch.Tensor
    """The sum of the L2 norms of what it then added, weighted, float64 `[E]`."""
    entropy: float | None = None
    """The sum over the tokens of the entropy of the router's softmax, in bits; None if it makes none."""
    overlap: dict[str, int] = field(default_factory=dict)
    """Other parent -> how many of all choices its router would have made, too."""

    def add(self, other: Routing) -> None:
        """Take in what the same layer did with other tokens."""
        self.tokens += other.tokens
        self.choices += other.choices
        self.weights += other.weights
        self.norms += other.norms
        if self.entropy is not None and other.entropy is not None:
            self.entropy += other.entropy
        for name, count in other.overlap.items():
            self.overlap[name] += count

    def to_dict(self) -> dict[str, Any]:
        """Plain data, by expert (docs/diagnostics.md, Experts): `weights` and `merit` are means over all
        tokens, entropies are in bits. What the model does not have is left out."""
        choices = self.choices.tolist()
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "per_token": self.per_token,
            "choices": choices,
            "weights": (self.weights / self.tokens).tolist(),
            "merit": (self.norms / self.tokens).tolist(),
            "load_entropy": load_entropy(choices),
        }
        if self.entropy is not None:
            found["token_entropy"] = self.entropy / self.tokens
        if self.overlap:
            total = self.tokens * self.per_token
            found["overlap"] = {name: count / total for name, count in self.overlap.items()}
        return found


@contextmanager
def routed(
    layers: tuple[DecoderLayer, ...], others: OtherRouters | None = None
) -> Iterator[dict[int, Routing]]:
    """What the layers that have experts do in the run that is made inside, by layer; see `run_by_pairs`.

    Experts of a form that is not known are passed over. `others` are asked what they would have chosen.
    """
    seen: dict[int, Routing] = {}
    said: dict[int, tuple[float | None, dict[str, int]]] = {}

    def keep_router(
        layer: int,
        softmax: bool,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        choices: dict[str, torch.Tensor],
    ) -> None:
        entropy = float(token_entropies(scores).sum()) if softmax else None
        said[layer] = entropy, {name: overlap(chosen, other) for name, other in choices.items()}

    def keep_experts(
        layer: int,
        experts: int,
        index: torch.Tensor,
        weights: torch.Tensor,
        weighted: torch.Tensor,
    ) -> None:
        chosen = index.reshape(-1).cpu()
        norms = torch.linalg.vector_norm(weighted, dim=-1, dtype=torch.float64)
        zeros = torch.zeros(experts, dtype=torch.float64)
        seen[layer] = Routing(
            index.shape[0],
            index.shape[-1],
            torch.bincount(chosen, minlength=experts),
            zeros.index_add(0, chosen, weights.reshape(-1).double().cpu()),
            zeros.index_add(0, chosen, norms.cpu()),
            *said.pop(layer, (None, {})),
        )

    with ExitStack() as watching:
        for layer in layers:
            experts = find_experts(layer.module)
            if experts is None:
                continue
            count = getattr(experts[1], "num_experts", 0)
            watching.enter_context(
                run_by_pairs(experts[1], partial(keep_experts, layer.index, count))
            )
            found = find_router(layer.module)
            if found is not None:
                path, router = found
                inside, _, name = path.rpartition(".")
                around = layer.module.get_submodule(inside)
                place = ".".join(filter(None, (layer.name, inside)))
                keep = partial(keep_router, layer.index, has_softmax(router))
                asked = partial(others.of, place, name, around) if others else dict
                watching.enter_context(observed_router(name, around, keep, asked))
        yield seen
