"""The routers of a mixture of experts: how sure they are of a token, and what another one would choose."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.checkpoints.architecture import canonical_name
from workers.merging.sources import TORCH_DTYPES, Source

ROUTERS = ("gate", "router")
"""The last part of a router's name, in all mixtures of transformers 5."""

Weights = dict[str, torch.Tensor]
"""A router's parameters and buffers, by their names in it."""


class OtherRouters:
    """The routers of other checkpoints, as a model of this family would hold them.

    They are read layer by layer. `layers` of them are kept at a time (None: all).
    """

    def __init__(self, parents: Mapping[str, Checkpoint], layers: int | None = 1) -> None:
        self._maps = {name: ArchitectureMap.of(parent) for name, parent in parents.items()}
        self._sources = {name: Source(parent) for name, parent in parents.items()}
        self.of: Callable[[str, torch.nn.Module], dict[str, Weights]] = lru_cache(layers)(self._of)
        """Parent -> its weights of a router, by the router's name in the model; without those that have no
        router of the same shape there."""

    def _of(self, called: str, router: torch.nn.Module) -> dict[str, Weights]:
        own = router.state_dict(keep_vars=True)
        found = {}
        for parent in self._maps:
            read = {name: self._read(parent, f"{called}.{name}", t) for name, t in own.items()}
            weights = {name: values for name, values in read.items() if values is not None}
            if own and len(weights) == len(own):
                found[parent] = weights
        return found

    def _read(self, parent: str, name: str, like: torch.Tensor) -> torch.Tensor | None:
        stored = self._maps[parent].by_name.get(canonical_name(name))
        if stored is None or stored.shape != tuple(like.shape):
            return None
        if not TORCH_DTYPES[stored.values_dtype].is_floating_point:
            return None
        values = self._sources[parent].read(stored, 0, stored.elements)
        return values.to(like.dtype, copy=True).view(like.shape).to(like.device)


@contextmanager
def observed_router(
    router: torch.nn.Module,
    keep: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], None],
    others: Callable[[], Mapping[str, Weights]],
) -> Iterator[None]:
    """`keep` is told of each call of a router that is made inside: what it gives for all experts
    `[tokens, E]`, which it chooses `[tokens, k]`, and which `others` would choose of the same hidden states.

    A choice is the module's own rule (groups, correction biases, whatever it does) with the other one's
    weights. Routers that do not give `(scores of all, weights, chosen)` are passed over.
    """
    asking = False

    def hook(
        module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        nonlocal asking
        if asking or not _is_choice(output):
            return
        asking = True
        try:
            choices = {
                name: torch.func.functional_call(module, weights, arguments, named)[2]
                for name, weights in others().items()
            }
        finally:
            asking = False
        keep(output[0], output[2], choices)

    handle = router.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def find_router(layer: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """A layer's router, with its name in the layer; None of a dense one."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in ROUTERS:
            return name, module
    return None


def overlap(chosen: torch.Tensor, others: torch.Tensor) -> int:
    """How many of the experts `chosen` `[tokens, k]` are among `others` `[tokens, k]`, token by token."""
    return int((chosen.unsqueeze(-1) == others.unsqueeze(-2)).any(-1).sum())


def token_entropies(scores: torch.Tensor) -> torch.Tensor:
    """Bits of entropy of each token's softmax over all experts, float64 `[tokens]`.

    `scores` `[tokens, E]`: what goes into the softmax, or what comes out of it (Gemma 4's router).
    """
    values = scores.double()
    is_softmax = bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 1e-2).all())
    shares = values if is_softmax else values.softmax(-1)
    entropies: torch.Tensor = torch.special.entr(shares).sum(-1) / math.log(2)
    return entropies


def load_entropy(choices: Sequence[int]) -> float:
    """Bits of entropy of how a layer's choices are spread over its experts; log2(E) if evenly."""
    total = sum(choices)
    shares = [count / total for count in choices if count]
    return max(0.0, -math.fsum(share * math.log2(share) for share in shares))


def has_softmax(router: torch.nn.Module) -> bool:
    """Whether the router's own code makes a softmax of its scores, not a sigmoid of each."""
    try:
        text = inspect.getsource(type(router).forward)
    except (OSError, TypeError):
        return False
    return "softmax" in text and "sigmoid" not in text


def _is_choice(output: Any) -> bool:
    return (
        isinstance(output, tuple)
        and len(output) == 3
        and all(isinstance(part, torch.Tensor) and part.ndim == 2 for part in output)
        and output[0].is_floating_point()
        and not output[2].is_floating_point()
        and output[1].shape == output[2].shape
    )
