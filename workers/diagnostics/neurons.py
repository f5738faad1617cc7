"""Feed-forward neurons of two models, matched by their activations on the same states.

Both networks are given what reaches the father's on a calibration text, and run with the father's
activation function: that is what a neuron of the mother will compute in his place. No alignment of tokens
is needed, and both have one sample for each token. (Activations of each model on its own states would
match neurons that mean the same thing, but whose weights read and write the states of another model.)

Matching by correlation: Li et al., arXiv 1511.07543; as an assignment problem: Ainsworth et al., Git
Re-Basin, arXiv 2209.04836.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.checkpoints.names import canonical_name
from workers.errors import BadInputError

if TYPE_CHECKING:
    import torch

    from workers.merging.transplant import NeuronMatching

CHUNK_TOKENS = 1024
"""Tokens whose activations are held at once."""

CHANCE_PAIRS = 1 << 20
MOST_SHUFFLES = 32
"""So many pairs are looked at for what chance attains, but in so many shuffles at most."""

GATE = re.compile(r"layers\.(\d+)\.mlp\.gate_proj\.weight")


@dataclass(frozen=True)
class CalibrationStates:
    """What reaches the feed-forward networks of a model while it reads a text."""

    inputs: dict[int, torch.Tensor]
    """Layer -> [tokens, hidden], behind the layer's own norm."""
    activations: dict[int, Callable[[torch.Tensor], torch.Tensor]]
    """Layer -> its activation function."""
    tokens: int


@dataclass(frozen=True)
class FeedForward:
    """A gated network: `down (activation(gate x) * up x)`."""

    gate: torch.Tensor
    """[neurons, hidden], fp32, as `up`."""
    up: torch.Tensor
    down: torch.Tensor
    """[hidden, neurons], fp32."""

    def neurons(
        self, inputs: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """[tokens, neurons]: what each neuron multiplies its column of `down` with."""
        return activation(inputs @ self.gate.T) * (inputs @ self.up.T)


def read_feed_forward(parent: ArchitectureMap, layer: int, device: Any = "cpu") -> FeedForward:
    """The dense, gated feed-forward network of a layer."""
    import torch

    from workers.merging.sources import Source

    source = Source(cast(Checkpoint, parent.checkpoint))

    def read(role: str) -> torch.Tensor:
        tensor = parent.by_name[f"layers.{layer}.mlp.{role}.weight"]
        return source.read(tensor, 0, tensor.elements).view(tensor.shape).to(device, torch.float32)

    return FeedForward(read("gate_proj"), read("up_proj"), read("down_proj"))


def calibration_states(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    tokens: int,
    window: int,
) -> CalibrationStates:
    """Run `model` (of transformers) over `texts`, each cut to `window` tokens, until there are `tokens`.

    A text's first token is left out: what reaches the networks there is the same in every text, and so
    large that correlations would be about it alone. Raises `BadInputError` if no text has a second one,
    or a network has no activation function of its own (LFM2).
    """
    import torch

    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    activations: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
    count = 0
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            match = GATE.fullmatch(canonical_name(f"{name}.weight"))
            if match is None or int(match[1]) not in found:
                continue
            layer = int(match[1])
            network = model.get_submodule(name.rpartition(".")[0])
            if not hasattr(network, "act_fn"):
                raise BadInputError(
                    f"{type(model).__name__}: the feed-forward network of layer {layer} is no gated network "
                    "of the common form (act_fn): its neurons cannot be aligned"
                )
            activations[layer] = network.act_fn
            kept = found[layer]

            def keep(module: Any, given: Any, kept: list[torch.Tensor] = kept) -> None:
                kept.append(given[0].detach()[0, 1:].clone())

            hooks.callback(module.register_forward_pre_hook(keep).remove)
        assert activations.keys() == found.keys(), "the mapper names layers of this very model"
        with torch.inference_mode():
            for text in texts:
                ids = tokenizer(text, truncation=True, max_length=window)["input_ids"]
                if count >= tokens or len(ids) < 2:
                    continue
                # Without the head: its logits may be the largest thing there is; and where a model is
                # asked for the last ones alone, its last layers may skip the other tokens (Gemma 4).
                model.base_model(
                    input_ids=torch.tensor([ids], device=model.device), use_cache=False
                )
                count += len(ids) - 1
    if not count:
        raise BadInputError("calibration: no text in it is two tokens long")
    inputs = {layer: torch.cat(kept) for layer, kept in found.items()}
    for layer, states in inputs.items():
        if len(states) != count or not bool(states.isfinite().all()):
            raise BadInputError(
                f"calibration: the father's layer {layer} was given {len(states)} states for {count} "
                "tokens, or some that are not finite: it cannot be compared with the mother's"
            )
    return CalibrationStates(inputs, activations, count)


def chance_correlation(
    inputs: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    father: FeedForward,
    mother: FeedForward,
) -> float:
    """The highest |correlation| of any pair when the mother's input channels are shuffled.

    Her weights are the same, but what they read has no meaning any more: so much comes from the states
    and the number of pairs alone. Small networks are shuffled more often; always in the same ways.
    """
    import numpy
    import torch

    generator = numpy.random.default_rng(0)
    highest = 0.0
    for _ in range(min(MOST_SHUFFLES, -(-CHANCE_PAIRS // (len(father.gate) * len(mother.gate))))):
        order = torch.from_numpy(generator.permutation(mother.gate.shape[1]))
        shuffled = FeedForward(mother.gate[:, order], mother.up[:, order], mother.down)
        found = numpy.abs(_correlations(inputs, activation, father, shuffled)).max()
        highest = max(highest, float(found))
    return highest


def match_neurons(
    inputs: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    father: FeedForward,
    mother: FeedForward,
    least: float,
) -> NeuronMatching:
    """Assign the mother's neurons to the father's so that the sum of |correlation| is greatest.

    `inputs` is [tokens, hidden]. Pairs that do not exceed `least` are dropped, so that neurons that
    never vary have none.
    Memory: an fp32 and a float64 matrix [the father's neurons, the mother's].
    """
    import numpy
    from scipy.optimize import linear_sum_assignment

    from workers.merging.transplant import NeuronMatching

    correlations = _correlations(inputs, activation, father, mother)
    strength = numpy.abs(correlations)
    rows, columns = linear_sum_assignment(strength, maximize=True)
    good = strength[rows, columns] > least
    rows, columns = rows[good], columns[good]
    neurons = len(strength)
    partners = numpy.full(neurons, -1, numpy.int64)
    partners[rows] = columns
    flipped = numpy.zeros(neurons, bool)
    flipped[rows] = correlations[rows, columns] < 0
    correlation = numpy.zeros(neurons)
    correlation[rows] = strength[rows, columns]
    scale = _scale(inputs, activation, father, mother, partners)
    return NeuronMatching(partners, flipped, correlation, scale)


def _correlations(
    inputs: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    father: FeedForward,
    mother: FeedForward,
) -> Any:
    """numpy [the father's neurons, the mother's]; 0 for a neuron that does not vary."""
    import torch

    pair = (father, mother)
    # Sums of what deviates from the means of the first chunk, so that large means cost no digits.
    origins = [network.neurons(next(_chunks(inputs)), activation).mean(0) for network in pair]
    sums = [torch.zeros_like(origin, dtype=torch.float64) for origin in origins]
    squares = [torch.zeros_like(total) for total in sums]
    product = torch.zeros(len(father.gate), len(mother.gate), device=inputs.device)
    for chunk in _chunks(inputs):
        mine, hers = (
            network.neurons(chunk, activation) - origin
            for network, origin in zip(pair, origins, strict=True)
        )
        product += mine.T @ hers
        for values, total, square in zip((mine, hers), sums, squares, strict=True):
            total += values.double().sum(0)
            square += values.double().square().sum(0)
    means = [total / len(inputs) for total in sums]
    product /= len(inputs)
    product.addr_(means[0].float(), means[1].float(), alpha=-1)
    for number, (mean, origin) in enumerate(zip(means, origins, strict=True)):
        spread = (squares[number] / len(inputs) - mean.square()).clamp(min=0).sqrt()
        # Below this share of its mean a neuron's variation is that of rounding.
        varies = spread > 1e-6 * (mean + origin).abs()
        factor = torch.where(varies, 1 / spread, 0).float()
        product *= factor[:, None] if number == 0 else factor
    return product.cpu().numpy()


def _scale(
    inputs: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    father: FeedForward,
    mother: FeedForward,
    partners: Any,
) -> float:
    """How much more the father's matched neurons write than the mother's, to three digits.

    Root mean squares over tokens and channels. Least squares would be the other choice; it shrinks what
    does not point the father's way until the mother's neurons say nothing. Rounded, so that errors of
    the measurement do not reach weights that need no scaling.
    """
    import torch

    matched = torch.from_numpy(partners >= 0)
    if not bool(matched.any()):
        return 1.0
    hers = torch.from_numpy(partners)[matched].to(inputs.device)
    matched = matched.to(inputs.device)
    squares = [0.0, 0.0]
    for chunk in _chunks(inputs):
        own = father.neurons(chunk, activation)[:, matched] @ father.down[:, matched].T
        other = mother.neurons(chunk, activation)[:, hers] @ mother.down[:, hers].T
        squares[0] += float(own.double().square().sum())
        squares[1] += float(other.double().square().sum())
    if not squares[0] or not squares[1]:
        return 1.0
    return float(f"{math.sqrt(squares[0] / squares[1]):.3g}")


def _chunks(inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    for first in range(0, len(inputs), CHUNK_TOKENS):
        yield inputs[first : first + CHUNK_TOKENS].float()
