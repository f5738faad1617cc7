"""The log-probabilities that a recipe's child gives to tokens, by transformers, without a live engine.

The child's weights are merged from the parents layer by layer, on the CPU, and dropped again: the model never
is in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from workers.checkpoints.names import EMBEDDING
from workers.diagnostics.expert_outputs import standing_for
from workers.errors import BadInputError
from workers.evaluation.engines.reload_check import head_of
from workers.experts.merged_model import MergedValues, StreamedChild
from workers.merging import Recipe


class ScoredChild(StreamedChild):
    """The child of one recipe after the other over the same parents; see `StreamedChild`.

    Its dtype is that of the model, whatever dtype the recipe says that the child is stored in.
    """

    def become(self, recipe: Recipe) -> None:
        """Take the weights of another recipe's child from now on. It must have the father's form."""
        if recipe.layers or recipe.vocabulary:
            raise BadInputError(
                f"recipe {recipe.id[:12]}: a live model has the father's layers and tokens: it takes no "
                "recipe with `layers` or `vocabulary`"
            )
        self.merging = self.merger.start(recipe)
        self._map, self._source = self.merging.plan.child, MergedValues(self.merging)

    @torch.inference_mode()
    def logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Of each prompt's tokens behind the first, the log-probability (nats)."""
        given = [torch.tensor([prompt]) for prompt in prompts]
        states = self.run_span(0, len(self.layers), self.begin(given))
        with self.loaded(self.outside_layers), self._head():
            return [self._read_off(*each) for each in zip(given, states, strict=True)]

    def _read_off(self, prompt: torch.Tensor, state: torch.Tensor) -> list[float]:
        """What the whole model makes of the last layer's hidden state."""

        def stand_in(*arguments: Any, **keywords: Any) -> Any:
            return (state,) if self._returns_tuple else state

        with ExitStack() as shortcuts:
            for layer in self.layers:
                shortcuts.enter_context(standing_for(layer.module, partial(stand_in)))
            logits = self.model(input_ids=prompt.to(self.device), use_cache=False).logits
        logprobs = logits[0, :-1].float().log_softmax(-1)
        found: list[float] = logprobs.gather(-1, prompt[0, 1:, None]).flatten().tolist()
        return found

    @contextmanager
    def _head(self) -> Iterator[None]:
        """The head in memory, for the block's time. It belongs to no decoder, so `loaded` leaves it out."""
        head = self.model.get_output_embeddings()
        before = dict(head.named_parameters())
        try:
            for name, parameter in before.items():
                values = self._head_values(name, parameter)
                setattr(head, name, torch.nn.Parameter(values, requires_grad=False))
            yield
        finally:
            for name, parameter in before.items():
                setattr(head, name, parameter)

    def _head_values(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        stored = head_of(self._map) if name == "weight" else f"lm_head.{name}"
        if stored == EMBEDDING:
            tied: torch.Tensor = self.model.get_input_embeddings().weight
            return tied.detach()
        tensor = self._map.by_name[stored]
        values = self._source.read(tensor, 0, tensor.elements)
        return values.to(parameter.dtype).view(parameter.shape)
