"""The hidden states that a model's experts are given for calibration prompts, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch

from workers.checkpoints import Checkpoint
from workers.diagnostics.calibration import CalibrationSet
from workers.diagnostics.layers import DecoderLayer
from workers.diagnostics.probe import encode
from workers.diagnostics.streaming import StreamedModel
from workers.experts.matching import spread
from workers.merging.threads import torch_threads

MOST_TOKENS = 1024
"""Of all prompts together, evenly spaced: that many tell the experts of any layer apart."""


def expert_inputs(
    checkpoint: Checkpoint,
    sets: Sequence[CalibrationSet],
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 1,
) -> dict[int, torch.Tensor]:
    """Layer -> hidden states `[tokens, hidden]` in fp32, on the CPU, of each layer whose experts are called
    as in transformers' mixtures.

    The model runs one layer at a time. Raises `BadInputError` if it cannot be run.
    """
    with torch_threads(threads):
        model = StreamedModel(checkpoint, dtype, device)
        prompts = encode(model.tokenizer, sets, model.location)
        lengths = [prompt.shape[1] for prompt in prompts]
        chosen = spread(torch.arange(sum(lengths)), MOST_TOKENS)
        ends = list(accumulate(lengths))
        kept = [
            chosen[(chosen >= end - length) & (chosen < end)] - (end - length)
            for length, end in zip(lengths, ends, strict=True)
        ]
        found: dict[int, list[torch.Tensor]] = {}

        def around(
            layer: DecoderLayer, number: int, run: Callable[[], torch.Tensor]
        ) -> torch.Tensor:
            with _given_to_experts(layer) as given:
                state = run()
            if given:
                own = found.setdefault(layer.index, [])
                own.append(given[0][kept[number].to(given[0].device)].float().cpu())
            return state

        model.run_span(0, len(model.layers), model.begin(prompts), around)
        return {layer: torch.cat(states) for layer, states in found.items()}


@contextmanager
def _given_to_experts(layer: DecoderLayer) -> Iterator[list[torch.Tensor]]:
    """What the `experts` module of a layer is given, `[tokens, hidden]`, in the run that is made inside."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = arguments[0] if arguments else named["hidden_states"]
        seen.append(states.detach().reshape(-1, states.shape[-1]))

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for name, module in layer.module.named_modules()
        if name.rpartition(".")[2] == "experts"
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
