"""A worker's parts of probes that are divided among workers: spans of layers, or the experts of a layer.

What goes between workers is packed: hidden states, what experts are asked, and what they give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from workers.checkpoints import Checkpoint
from workers.diagnostics.calibration import CalibrationSet
from workers.diagnostics.expert_blocks import AskedExperts
from workers.diagnostics.probe import (
    PackedStates,
    Rows,
    begin_layers,
    pack_states,
    probe_layer,
    probe_span,
    unpack_states,
)
from workers.diagnostics.streaming import StreamedModel
from workers.merging.threads import torch_threads

Sets = Sequence[CalibrationSet]
Kind = tuple[str, str]
"""dtype and device."""

PackedAsked = tuple[PackedStates, PackedStates]
"""Hidden states and chosen experts of each prompt; see `AskedExperts`."""

PackedOutputs = Sequence[tuple[tuple[int, int], PackedStates]]
"""By range of experts; see `StreamedModel.finish_layer`."""


class ProbeParts:
    """Runs parts of the parents, of one at a time: its model stays for the next call."""

    def __init__(self, parents: Mapping[str, Checkpoint], threads: int) -> None:
        self._parents = parents
        self._threads = threads
        self._model: tuple[tuple[str, Kind], StreamedModel] | None = None
        self._begun: tuple[str, ...] | None = None
        """The sets whose prompts the model is ready for, by their content."""

    def span(
        self,
        parent: str,
        sets: Sets,
        span: tuple[int, int],
        states: PackedStates | None,
        kind: Kind,
    ) -> tuple[dict[str, Rows], PackedStates]:
        """See `probe_span`. The span's weights stay in memory for the next call."""
        with self._running(parent, kind) as model:
            self._begun = None
            model.hold(*span)
            given = None if states is None else unpack_states(states)
            rows, result = probe_span(model, sets, *span, given, self.others(parent))
            return rows, pack_states(result)

    def ask(
        self, parent: str, sets: Sets, layer: int, states: PackedStates | None, kind: Kind
    ) -> PackedAsked | None:
        """What the prompts ask of a layer's experts; None if they cannot be divided. The first layer needs
        no `states`."""
        with self._running(parent, kind) as model:
            begun = self._begin(model, sets, states)
            asked = model.ask_experts(layer, begun)
            if asked is None:
                return None
            return pack_states([one.states for one in asked]), pack_states(
                [one.index for one in asked]
            )

    def experts(
        self, parent: str, layer: int, experts: tuple[int, int], asked: PackedAsked, kind: Kind
    ) -> PackedStates:
        """What a range of a layer's experts gives for what the prompts ask of them."""
        with self._running(parent, kind) as model:
            states, index = (unpack_states(packed) for packed in asked)
            there = [AskedExperts(*one) for one in zip(states, index, strict=True)]
            return pack_states(model.run_experts(layer, there, experts))

    def layer(
        self,
        parent: str,
        sets: Sets,
        layer: int,
        states: PackedStates | None,
        outputs: PackedOutputs | None,
        kind: Kind,
    ) -> tuple[dict[str, Rows], PackedStates]:
        """See `probe_layer`."""
        with self._running(parent, kind) as model:
            begun = self._begin(model, sets, states)
            given = None
            if outputs is not None:
                given = [(experts, unpack_states(packed)) for experts, packed in outputs]
            rows, result = probe_layer(model, sets, layer, begun, given, self.others(parent))
            return rows, pack_states(result)

    def others(self, parent: str) -> dict[str, Checkpoint]:
        """The parents but this one."""
        return {name: other for name, other in self._parents.items() if name != parent}

    @contextmanager
    def _running(self, parent: str, kind: Kind) -> Iterator[StreamedModel]:
        with torch_threads(self._threads):
            key = parent, kind
            if self._model is None or self._model[0] != key:
                self._model = None  # what it holds goes before more comes
                self._begun = None
                self._model = key, StreamedModel(self._parents[parent], *kind)
            yield self._model[1]

    def _begin(
        self, model: StreamedModel, sets: Sets, states: PackedStates | None
    ) -> list[torch.Tensor]:
        content = tuple(calibration.sha256 for calibration in sets)
        begun = None
        if states is None or self._begun != content:
            begun = begin_layers(model, sets)
            self._begun = content
        if states is not None:
            return unpack_states(states)
        assert begun is not None
        return begun
