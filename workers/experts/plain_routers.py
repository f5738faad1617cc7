"""Which routers are plain: one matrix, whose softmax says how likely each expert is. Told from headers
alone."""

from __future__ import annotations

from typing import Any

from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.errors import BadInputError


def plain_routers(model: ArchitectureMap) -> dict[int, LogicalTensor]:
    """The routers `[E, H]` of a model's layers, the lowest first.

    Raises `BadInputError` if there are none, and for routers of another kind (with a bias, as in gpt-oss, or
    a sigmoid, as in DeepSeek-V3 and Llama 4): what is solved and compared of plain ones would mean nothing.
    """
    config = model.checkpoint.config
    text = config.get("text_config")
    found: dict[int, LogicalTensor] = {}
    for tensor in (tensor for tensor in model.tensors if tensor.component == "router"):
        if tensor.layer is None or tensor.layer in found or len(tensor.shape) != 2:
            raise BadInputError(
                f"{model.location}: {tensor.stored!r} belongs to a router that is more than one matrix"
            )
        found[tensor.layer] = tensor
    if not found:
        raise BadInputError(f"{model.location}: has no routers")
    if not takes_softmax(text if isinstance(text, dict) else config):
        raise BadInputError(f"{model.location}: its routers take no softmax over all experts")
    return dict(sorted(found.items()))


def takes_softmax(text_config: dict[str, Any]) -> bool:
    """Whether a router's chances are the softmax over all experts, by the language model's configuration."""
    kind = str(text_config.get("model_type", ""))
    return text_config.get("scoring_func", "softmax") == "softmax" and "llama4" not in kind
