"""The routers of a live model: where they are, what reaches them, and how they route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.checkpoints.names import canonical_name, classify
from workers.diagnostics.layers import DecoderLayer
from workers.diagnostics.routers import has_softmax
from workers.errors import BadInputError
from workers.experts.plain_routers import takes_softmax


class _ReachedError(Exception):
    """The router is about to run: nothing behind it is wanted."""


@dataclass(frozen=True)
class Router:
    """A router that routes by the softmax of one matrix."""

    layer: int
    name: str
    """Of its weight: the logical tensor's."""
    module: torch.nn.Module
    weight: str
    """Of its parameter in the module."""
    per_token: int
    """How many experts it chooses."""

    def put(self, values: torch.Tensor) -> None:
        """Route by these weights `[E, H]` from now on, until the layer is loaded anew."""
        own = getattr(self.module, self.weight)
        with torch.inference_mode():
            own.copy_(values)

    def inputs(self, run: Any, only: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What reaches it `[tokens, H]` while `run()` runs its layer, and what that gives.

        With `only`, the layer is left as soon as its router is reached, and gives nothing.
        """
        seen: list[torch.Tensor] = []

        def keep(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            states = arguments[0] if arguments else named["hidden_states"]
            seen.append(states.detach().reshape(-1, states.shape[-1]).clone())
            if only:
                raise _ReachedError

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            output = run()
        except _ReachedError:
            output = None
        finally:
            handle.remove()
        assert len(seen) == 1, f"the router of layer {self.layer} has run {len(seen)} times"
        return seen[0], output


def find_routers(model: Any, layers: Sequence[DecoderLayer], location: str) -> dict[int, Router]:
    """The routers by layer; layers without experts are left out.

    Raises `BadInputError` for a router that is not plain (see `plain_routers`).
    """
    config = model.config.get_text_config()
    found: dict[int, Router] = {}
    for layer in layers:
        own: dict[str, tuple[torch.nn.Module, str]] = {}
        for path, module in layer.module.named_modules():
            held = {**module._parameters, **module._buffers}
            for name in (name for name, tensor in held.items() if tensor is not None):
                full = canonical_name(".".join(filter(None, (layer.name, path, name))))
                if classify(full, {})[0] == "router":
                    own[full] = module, name
        if not own:
            continue
        (name, (module, weight)), *others = own.items()
        if others or not takes_softmax(config.to_dict()) or not has_softmax(module):
            raise BadInputError(
                f"{location}: the router of layer {layer.index} of {type(model).__name__} is more than the "
                "softmax of one matrix; its routing is not calibrated or compared"
            )
        per_token = getattr(config, "num_experts_per_tok", None)
        if not isinstance(per_token, int):
            raise BadInputError(f"{location}: its configuration has no num_experts_per_tok")
        found[layer.index] = Router(layer.index, name, module, weight, per_token)
    return found


def log_routing(states: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """The logarithms of the softmax over all experts, fp32 `[tokens, E]`."""
    return (states.float() @ router.float().T).log_softmax(-1)
