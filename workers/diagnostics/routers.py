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
from workers.checkpoints.names import canonical_name, classify
from workers.merging.sources import TORCH_DTYPES, Source

ROUTERS = ("gate", "router")
"""The last part of a router's name, in all mixtures of transformers 5."""

Weights = dict[str, torch.Tensor]
"""A router's parameters and buffers, by their names in the module around it: `gate.weight`. So are those that
this module keeps beside the router and gives it as arguments: the correction biases of MiniMax-M2, LFM2."""


class OtherRouters:
    """The routers of other checkpoints, as a model of this family would hold them.

    They are read layer by layer. `layers` of them are kept at a time (None: all).
    """

    def __init__(self, parents: Mapping[str, Checkpoint], layers: int | None = 1) -> None:
        self._maps = {name: ArchitectureMap.of(parent) for name, parent in parents.items()}
        self._sources = {name: Source(parent) for name, parent in parents.items()}
        self.of: Callable[[str, str, torch.nn.Module], dict[str, Weights]]
        self.of = lru_cache(layers)(self._of)
        """Parent -> its weights of a router, by the name in the model of the module around it, the router's
        name in that, and that; without parents that have no router of the same shape there."""

    def _of(self, place: str, name: str, around: torch.nn.Module) -> dict[str, Weights]:
        router = around.get_submodule(name).state_dict(keep_vars=True)
        own = {f"{name}.{key}": tensor for key, tensor in router.items()} | _beside(place, around)
        found = {}
        for parent in self._maps:
            read = {key: self._read(parent, f"{place}.{key}", t) for key, t in own.items()}
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


def _beside(place: str, around: torch.nn.Module) -> Weights:
    """What belongs to the router of the module `around`, of this place in the model, and is not in it."""
    held = {**around._parameters, **around._buffers}
    return {
        name: tensor
        for name, tensor in held.items()
        if tensor is not None and classify(canonical_name(f"{place}.{name}"), {})[0] == "router"
    }


@contextmanager
def observed_router(
    name: str,
    around: torch.nn.Module,
    keep: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], None],
    others: Callable[[], Mapping[str, Weights]],
) -> Iterator[None]:
    """`keep` is told of each call, made inside, of the router `name` of the module `around`: what it gives
    for all experts `[tokens, E]`, which it chooses `[tokens, k]`, and which `others` would choose of the same
    hidden states.

    A choice is the module's own rule (groups, correction biases, whatever it does) with the other one's
    weights. Routers that do not give `(scores of all, weights, chosen)` are passed over.
    """
    router = around.get_submodule(name)
    asking = False

    def choose(weights: Weights, arguments: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
        inside = f"{name}."
        own = {key[len(inside) :]: w for key, w in weights.items() if key.startswith(inside)}
        held = {**around._parameters, **around._buffers}
        beside = {id(held[key]): values for key, values in weights.items() if key in held}
        given = tuple(beside.get(id(argument), argument) for argument in arguments)
        by_name = {key: beside.get(id(argument), argument) for key, argument in named.items()}
        chosen: torch.Tensor = torch.func.functional_call(router, own, given, by_name)[2]
        return chosen

    def hook(
        module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        nonlocal asking
        if asking or not _is_choice(output):
            return
        asking = True
        try:
            choices = {
                parent: choose(weights, arguments, named) for parent, weights in others().items()
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
