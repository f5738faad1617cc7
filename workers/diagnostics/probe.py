"""The activation probe: how differently a model answers to prompts that ask for a capability.

For every decoder layer and component (attention, mlp), what the component adds to the residual stream
is compared between the two prompts of a pair by the cosine distance `1 - cos`:

* `mean_token`: of its means over the prompts' tokens behind the first. Models park attention on the first
  token whatever it is (attention sinks, arXiv 2309.17453), with activations that outweigh all others
  (arXiv 2402.17762): it says nothing of the prompt. Of a prompt of one token it is that token.
* `last_token`: of the last token's, which has seen the whole prompt.

Both are averaged over the pairs of a set, in float64. Prompts run one at a time, never padded, so that
a result depends neither on the other prompts nor on how an architecture treats padding. The idea is the
probe of the Darwin family (arXiv 2605.14386), which leaves the definition open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from workers.checkpoints import Checkpoint
from workers.diagnostics.calibration import CalibrationSet
from workers.diagnostics.layers import COMPONENTS, DecoderLayer, find_decoder, observed
from workers.diagnostics.reading import check_known, read_prompt
from workers.diagnostics.routers import OtherRouters
from workers.diagnostics.routing import Routing, routed
from workers.diagnostics.streaming import StreamedModel
from workers.errors import BadInputError
from workers.merging.threads import torch_threads

VARIANTS = ("mean_token", "last_token")

Rows = list[dict[str, Any]]
"""`{"layer", "component", "mean_token", "last_token"}` of each layer and component, in their order; of an mlp
of experts also `routing` (see `Routing.to_dict`), over all tokens of both prompts of each pair."""

ExpertOutputs = Sequence[tuple[tuple[int, int], Sequence[torch.Tensor]]]
"""(first, behind the last) of a range of a layer's experts, and what they give for each prompt."""

PackedStates = list[tuple[str, Any]]


def probe_checkpoint(
    checkpoint: Checkpoint,
    sets: Sequence[CalibrationSet],
    streamed: bool = True,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 1,
    others: Mapping[str, Checkpoint] | None = None,
) -> dict[str, Rows]:
    """The probe of one checkpoint: set -> rows; a distance that is not defined is None.

    `streamed` holds one decoder layer in memory at a time; the result is the same, bit by bit. It depends
    on `dtype`, `device` and `threads` in the last digits. `others` are the parents whose routers are compared
    with this one's. Raises `BadInputError` if the checkpoint cannot
    be run, or its activations are not finite.
    """
    with torch_threads(threads):
        model = StreamedModel(checkpoint, dtype, device)
        if streamed:
            return probe_streamed(model, sets, others)
        with model.loaded(lambda name: True):
            return probe_model(model.model, model.tokenizer, sets, checkpoint.location, others)


def probe_model(
    model: Any,
    tokenizer: Any,
    sets: Sequence[CalibrationSet],
    location: str,
    others: Mapping[str, Checkpoint] | None = None,
) -> dict[str, Rows]:
    """The probe of a live transformers model; see `probe_checkpoint`. Its head is not run."""
    decoder = find_decoder(model)
    device = next(decoder.module.parameters()).device
    prompts = encode(tokenizer, sets, location)
    tally = Tally(sets, location, OtherRouters(others or {}, layers=None))
    for number, prompt in enumerate(prompts):
        with (
            observed(decoder.layers) as seen,
            routed(decoder.layers, tally.others) as routes,
            torch.inference_mode(),
        ):
            decoder.module(input_ids=prompt.to(device), use_cache=False)
            for key, output in seen.items():
                tally.add(number, key, output)
            for layer, routing in routes.items():
                tally.add_routing(number, layer, routing)
    return tally.rows()


def probe_streamed(
    model: StreamedModel,
    sets: Sequence[CalibrationSet],
    others: Mapping[str, Checkpoint] | None = None,
) -> dict[str, Rows]:
    """The probe of a model that is run layer by layer; see `probe_checkpoint`."""
    states = model.begin(encode(model.tokenizer, sets, model.location))
    tally = Tally(sets, model.location, OtherRouters(others or {}))
    model.run_span(0, len(model.layers), states, tally.observe)
    return tally.rows()


def probe_span(
    model: StreamedModel,
    sets: Sequence[CalibrationSet],
    first: int,
    last: int,
    hidden_states: Sequence[torch.Tensor] | None,
    others: Mapping[str, Checkpoint] | None = None,
) -> tuple[dict[str, Rows], list[torch.Tensor]]:
    """The rows of layers `first` to `last - 1`, and the hidden states behind them for the next span.

    `hidden_states` are those of the span before; None for the first. The rows of all spans together are
    those of `probe_streamed`.
    """
    begun = model.begin(encode(model.tokenizer, sets, model.location))
    tally = Tally(sets, model.location, OtherRouters(others or {}))
    states = begun if hidden_states is None else hidden_states
    states = model.run_span(first, last, states, tally.observe)
    return tally.rows(), states


def begin_layers(model: StreamedModel, sets: Sequence[CalibrationSet]) -> list[torch.Tensor]:
    """The hidden states at the first layer of the sets' prompts, which `model` is then ready for."""
    return model.begin(encode(model.tokenizer, sets, model.location))


def probe_layer(
    model: StreamedModel,
    sets: Sequence[CalibrationSet],
    layer: int,
    hidden_states: Sequence[torch.Tensor],
    outputs: ExpertOutputs | None,
    others: Mapping[str, Checkpoint] | None = None,
) -> tuple[dict[str, Rows], list[torch.Tensor]]:
    """The rows of one layer, and the hidden states behind it; `begin_layers` comes first.

    `outputs` are what ranges of its experts gave elsewhere; None: the layer is run here. The rows of all
    layers together are those of `probe_streamed`.
    """
    tally = Tally(sets, model.location, OtherRouters(others or {}))
    if outputs is None:
        states = model.run_span(layer, layer + 1, hidden_states, tally.observe)
    else:
        states = model.finish_layer(layer, hidden_states, outputs, tally.observe)
    return tally.rows(), states


def pack_states(states: Sequence[torch.Tensor]) -> PackedStates:
    """Hidden states to send to another process: (dtype, bytes as a uint8 array) of each."""
    return [
        (
            str(state.dtype).removeprefix("torch."),
            state.cpu().contiguous().view(torch.uint8).numpy(),
        )
        for state in states
    ]


def unpack_states(packed: PackedStates) -> list[torch.Tensor]:
    """What `pack_states` was given, on the CPU."""
    return [
        # Copied into place: numpy's strides of an empty array would not do for a view.
        torch.empty(values.shape, dtype=torch.uint8)
        .copy_(torch.tensor(values))
        .view(getattr(torch, dtype))
        for dtype, values in packed
    ]


def encode(tokenizer: Any, sets: Sequence[CalibrationSet], location: str) -> list[torch.Tensor]:
    """Token ids `[1, tokens]` of all prompts: of each pair the conditioned one, then the generic one.

    Raises `BadInputError` for a prompt without tokens, and for a set that the tokenizer hardly knows.
    """
    prompts = []
    for calibration in sets:
        readings = []
        for pair in calibration.pairs:
            for kind, text in (("conditioned", pair.conditioned), ("generic", pair.generic)):
                reading = read_prompt(tokenizer, text)
                if not reading.ids:
                    raise BadInputError(
                        f"{location}: the {kind} prompt {pair.id!r} of set {calibration.name!r} has no tokens"
                    )
                readings.append(reading)
                prompts.append(torch.tensor([reading.ids]))
        check_known(
            readings,
            location,
            f"the calibration set {calibration.name!r}",
            "probe with a set that is written for it",
        )
    return prompts


@dataclass
class Tally:
    """Distances of the pairs, as the runs of their prompts come in."""

    sets: Sequence[CalibrationSet]
    location: str
    others: OtherRouters
    _first: dict[tuple[int, int, str], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    _distances: dict[tuple[int, int, str], tuple[float | None, ...]] = field(default_factory=dict)
    _routing: dict[tuple[str, int], Routing] = field(default_factory=dict)

    def observe(
        self, layer: DecoderLayer, number: int, run: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Run a layer of prompt `number` and take what its components add; for `run_span`."""
        with observed((layer,)) as seen, routed((layer,), self.others) as routes:
            state = run()
            for key, output in seen.items():
                self.add(number, key, output)
            for index, routing in routes.items():
                self.add_routing(number, index, routing)
        return state

    def add(self, number: int, key: tuple[int, str], output: torch.Tensor) -> None:
        """Take what a component added, `[tokens, hidden]`, of prompt `number` (as `encode` orders them)."""
        values = output.double()
        vectors = (values[min(1, len(values) - 1) :].mean(0).cpu(), values[-1].cpu())
        if not all(bool(vector.isfinite().all()) for vector in vectors):
            raise BadInputError(
                f"{self.location}: {key[1]} of layer {key[0]} gives activations that are not finite numbers"
            )
        place = (number // 2, *key)
        if number % 2 == 0:
            self._first[place] = vectors
            return
        conditioned = self._first.pop(place)
        self._distances[place] = tuple(map(cosine_distance, conditioned, vectors))

    def add_routing(self, number: int, layer: int, routing: Routing) -> None:
        """Take what the experts of a layer were given of prompt `number`."""
        ends = accumulate(2 * len(calibration.pairs) for calibration in self.sets)
        called = next(s.name for s, end in zip(self.sets, ends, strict=True) if number < end)
        known = self._routing.setdefault((called, layer), routing)
        if known is not routing:
            known.add(routing)

    def rows(self) -> dict[str, Rows]:
        """The means over each set's pairs."""
        assert not self._first
        found = sorted({layer for _, layer, _ in self._distances})
        result: dict[str, Rows] = {}
        begin = 0
        for calibration in self.sets:
            pairs = range(begin, begin + len(calibration.pairs))
            begin = pairs.stop
            result[calibration.name] = [
                {"layer": layer, "component": component}
                | {
                    variant: _mean([self._distances[pair, layer, component][n] for pair in pairs])
                    for n, variant in enumerate(VARIANTS)
                }
                | self._routing_of(calibration.name, layer, component)
                for layer in found
                for component in COMPONENTS
            ]
        return result

    def _routing_of(self, called: str, layer: int, component: str) -> dict[str, Any]:
        routing = self._routing.get((called, layer)) if component == "mlp" else None
        return {"routing": routing.to_dict()} if routing is not None else {}


def cosine_distance(one: torch.Tensor, two: torch.Tensor) -> float | None:
    """`1 - cos` of two float64 vectors; None if one of them is zero.

    As half the squared distance of the unit vectors, which is the same, but exact for equal vectors and
    not rounded away for close ones.
    """
    lengths = [float(torch.linalg.vector_norm(vector)) for vector in (one, two)]
    if 0.0 in lengths:
        return None
    return float((one / lengths[0] - two / lengths[1]).square().sum()) / 2


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(values) if len(defined) == len(values) else None
