"""How a child routes the prompts of its parents, compared with how each parent routes them itself.

Every model reads the same tokens and has its own hidden states: what is compared is which experts a token
meets, layer by layer. Against each parent, over the tokens of its own prompts:

* `overlap`: the mean share of the k experts that the parent chooses for a token which the child chooses too;
* `kl`: the mean divergence of the child's routing from the parent's, KL(parent || child) of the softmax
  over all experts, in nats.

Of each model by itself `choices`, how often each expert was chosen, and `load_entropy`, the entropy of the
choices' shares in bits: log2 E if all experts carry the same. Chances are computed in fp32 from what
reaches the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.checkpoints import Checkpoint
from workers.diagnostics.layers import DecoderLayer
from workers.diagnostics.reading import check_known, read_prompt
from workers.diagnostics.routers import load_entropy, overlap
from workers.diagnostics.streaming import StreamedModel
from workers.errors import BadInputError
from workers.experts.merged_model import StreamedChild
from workers.experts.routers import find_routers, log_routing
from workers.merging import Recipe

Routing = list[torch.Tensor]
"""Of each prompt the logarithms of the chances of all experts, fp32 `[tokens, E]`."""

CHILD = "child"


@dataclass(frozen=True)
class Prompts:
    """Whose prompts there are, each text once."""

    texts: tuple[str, ...]
    of: dict[str, tuple[int, ...]]
    """Parent -> the numbers of its own."""

    @staticmethod
    def gather(given: Mapping[str, Sequence[str]]) -> Prompts:
        """The prompts of all parents; those that several share are there once."""
        texts = tuple(dict.fromkeys(text for own in given.values() for text in own))
        number = {text: place for place, text in enumerate(texts)}
        return Prompts(texts, {name: tuple(number[t] for t in own) for name, own in given.items()})

    def check(self, tokenizer: Any, location: str) -> None:
        """Raise `BadInputError` if the tokenizer hardly knows the prompts of some parent."""
        for name, numbers in self.of.items():
            check_known(
                (read_prompt(tokenizer, self.texts[number]) for number in numbers),
                location,
                f"the calibration prompts of {name}",
                "calibrate with a set that is written for it",
            )

    def encode(self, tokenizer: Any, location: str) -> list[torch.Tensor]:
        """Token ids `[1, tokens]` of each text."""
        prompts = []
        for text in self.texts:
            ids = tokenizer(text)["input_ids"]
            if not ids:
                raise BadInputError(
                    f"{location}: the calibration prompt {text[:40]!r} has no tokens"
                )
            prompts.append(torch.tensor([ids]))
        return prompts


def listen(model: StreamedModel, prompts: Sequence[torch.Tensor]) -> dict[int, Routing]:
    """How the layers of a model that have experts route these prompts."""
    routers = find_routers(model.model, model.layers, model.location)
    found: dict[int, Routing] = {layer: [] for layer in routers}

    def hear(layer: DecoderLayer, number: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        router = routers.get(layer.index)
        if router is None:
            return run()
        states, output = router.inputs(run)
        weight = getattr(router.module, router.weight)
        found[layer.index].append(log_routing(states, weight).cpu())
        assert output is not None
        return output

    model.run_span(0, len(model.layers), model.begin(prompts), hear)
    return found


class OwnRouting:
    """How each parent routes its own prompts, its experts in the order of the child's."""

    def __init__(
        self,
        parents: dict[str, Checkpoint],
        prompts: Prompts,
        tokens: Sequence[torch.Tensor],
        recipe: Recipe,
        dtype: str,
        device: str,
    ) -> None:
        self.prompts = prompts
        self._of: dict[str, dict[int, Routing]] = {}
        for name, own in prompts.of.items():
            # One at a time: a model's layers come and go, its embedding too.
            heard = listen(
                StreamedModel(parents[name], dtype, device), [tokens[number] for number in own]
            )
            for layer, order in recipe.experts.get(name, {}).items():
                heard[layer] = [routing[:, list(order)] for routing in heard[layer]]
            self._of[name] = heard

    def row(self, layer: int, per_token: int, models: Mapping[str, Routing]) -> dict[str, Any]:
        """What the module tells, for one layer: of `models`, each of which has routed all prompts, against
        the parents; and of the parents by themselves."""
        told: dict[str, Any] = {}
        for name, routing in models.items():
            told[name] = _load(routing, per_token) | {
                "against": {
                    parent: _agreement(
                        of[layer],
                        [routing[number] for number in self.prompts.of[parent]],
                        per_token,
                    )
                    for parent, of in self._of.items()
                }
            }
        return {
            "layer": layer,
            "per_token": per_token,
            "models": told,
            "parents": {parent: _load(of[layer], per_token) for parent, of in self._of.items()},
        }


def compare_routing(
    recipe: Recipe,
    parents: dict[str, Checkpoint],
    base: Checkpoint | None,
    texts: Mapping[str, Sequence[str]],
    dtype: str = "auto",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """The rows of all layers with experts of a recipe's child; `texts`: parent -> its own prompts.

    Models are streamed, one layer in memory at a time. Raises `BadInputError` for a recipe whose routing is
    not followed, and for routers of another kind (see `find_routers`).
    """
    prompts = Prompts.gather(texts)
    child = StreamedChild(recipe, parents, base, dtype, device)
    tokens = prompts.encode(child.tokenizer, child.location)
    own = OwnRouting(parents, prompts, tokens, recipe, dtype, device)
    routers = find_routers(child.model, child.layers, child.location)
    heard = listen(child, tokens)
    return [
        own.row(layer, router.per_token, {CHILD: heard[layer]}) for layer, router in routers.items()
    ]


def _agreement(own: Routing, other: Routing, per_token: int) -> dict[str, float]:
    parent, child = torch.cat(own).double(), torch.cat(other).double()
    chosen = [routing.topk(per_token).indices for routing in (parent, child)]
    divergence = (parent.exp() * (parent - child)).sum(-1)
    return {
        "overlap": overlap(*chosen) / chosen[0].numel(),
        "kl": max(0.0, float(divergence.mean())),
    }


def _load(routing: Routing, per_token: int) -> dict[str, Any]:
    chances = torch.cat(routing)
    choices = torch.bincount(
        chances.topk(per_token).indices.reshape(-1), minlength=chances.shape[-1]
    )
    return {
        "tokens": len(chances),
        "choices": choices.tolist(),
        "load_entropy": load_entropy(choices.tolist()),
    }
