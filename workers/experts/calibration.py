"""HARC over all layers of a recipe's child, the lowest first: each hidden state has gone through the layers
that are already merged and calibrated (see `harc` for the equation).

A layer is merged when it is its turn. Its attention runs on the calibration prompts as far as the router,
the equation is solved, and the layer runs whole with the new router. Prompts that are held out go along
once for each kind of router that is compared. So what is in memory is one layer, the hidden states
`[tokens, H]` of the calibration prompts and (for each kind) of those held out, and the parents' routing of
those held out, `[tokens, E]` fp32 for each layer and parent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from workers.checkpoints import Checkpoint
from workers.diagnostics.layers import DecoderLayer
from workers.errors import BadInputError
from workers.experts.calibration_order import CalibrationOrder
from workers.experts.harc import Donor, Solution, calibrate
from workers.experts.merged_model import StreamedChild
from workers.experts.routers import Router, find_routers, log_routing
from workers.experts.routing_comparison import OwnRouting, Prompts
from workers.merging import Recipe
from workers.merging.sources import DTYPE_NAMES

KEPT, CALIBRATED = "keep", "harc"


@dataclass(frozen=True)
class CalibratedLayer:
    """The router of one layer, as it is stored, and how it came about."""

    name: str
    """Of the logical tensor."""
    stored: str
    dtype: str
    shape: tuple[int, ...]
    values: bytes
    tokens: dict[str, int]
    """Donor -> tokens that its part of the equation is of."""
    solution: dict[str, Any]
    """`iterations`, `residual`, and `start`, the residual of the router that it was started from."""
    routing: dict[str, Any]
    """See `routing_comparison`: the kinds of routers, and the donors."""


class Calibration:
    """One run over the layers. It stands before `position`: the next layer that can be asked for."""

    def __init__(
        self,
        order: CalibrationOrder,
        parents: dict[str, Checkpoint],
        base: Checkpoint | None,
        known: Mapping[int, bytes],
    ) -> None:
        """`known`: routers of the lowest layers that an earlier run has calibrated."""
        self.order = order
        self._recipe = Recipe.from_dict(order.recipe)
        self.child = StreamedChild(self._recipe, parents, base, order.dtype, order.device)
        self.routers = find_routers(self.child.model, self.child.layers, self.child.location)
        self._calibrated, held_out = Prompts.gather(order.texts), Prompts.gather(order.held_out)
        tokenizer, location = self.child.tokenizer, self.child.location
        self._calibrated.check(tokenizer, location)
        tokens = self._calibrated.encode(tokenizer, location)
        others = held_out.encode(tokenizer, location)
        self._own = OwnRouting(parents, held_out, others, self._recipe, order.dtype, order.device)
        compared = {name: Recipe.from_dict(recipe) for name, recipe in order.compared.items()}
        self._kinds: dict[str, Recipe | None] = {KEPT: self._recipe, **compared, CALIBRATED: None}
        self._held_out = len(others)
        self._calibrating = len(tokens)
        self._states = self.child.begin(tokens + others * len(self._kinds))
        self.position = 0
        self.known: dict[int, str] = {}
        """The layers whose routers have been put so far, and the SHA-256 of these."""
        for layer, values in sorted(known.items()):
            self._go_to(layer)
            self._hold(layer)
            self._finish(layer, self._stored_router(layer, values))

    def calibrate(self, layer: int) -> CalibratedLayer:
        """Calibrate the router of this layer, behind all that have been."""
        self._go_to(layer)
        self._hold(layer)
        router = self.routers[layer]
        states = self._states_at(router)
        donors = {
            name: Donor(
                self.child.router_in(name, router.name).to(self.child.device),
                [states[number] for number in own],
            )
            for name, own in self._calibrated.of.items()
        }
        start = self.child.router_of(self._recipe, router.name).to(self.child.device)
        order = self.order
        try:
            found = calibrate(
                start, list(donors.values()), order.shrink, order.iterations, order.tolerance
            )
        except BadInputError as error:
            raise BadInputError(f"{self.child.location}: layer {layer}: {error}") from error
        stored = found.router.to(start.dtype).cpu()
        routing = self._finish(layer, stored)
        tensor = self.child.merging.plan.child.by_name[router.name]
        return CalibratedLayer(
            router.name,
            tensor.stored,
            DTYPE_NAMES[stored.dtype],
            tuple(stored.shape),
            _bytes(stored),
            {name: sum(map(len, donor.states)) for name, donor in donors.items()},
            _told(found),
            routing,
        )

    def _go_to(self, layer: int) -> None:
        """Through the layers without experts that lie before it."""
        assert self.position <= layer, f"layer {layer} lies behind"
        assert not any(self.position <= other < layer for other in self.routers), layer
        for between in range(self.position, layer):
            self._hold(between)
            self._states = self.child.run_span(between, between + 1, self._states)
        self.position = layer

    def _hold(self, layer: int) -> None:
        self.child.hold(layer, layer + 1)

    def _states_at(self, router: Router) -> list[torch.Tensor]:
        """What reaches the router of the calibration prompts, `[tokens, H]` of each."""
        found = []

        def reach(layer: DecoderLayer, number: int, run: Any) -> torch.Tensor:
            if number < self._calibrating:
                found.append(router.inputs(run, only=True)[0])
            return self._states[number]

        self.child.run_span(router.layer, router.layer + 1, self._states, reach)
        return found

    def _finish(self, layer: int, calibrated: torch.Tensor) -> dict[str, Any]:
        """Run the layer, each prompt with its kind of router; what came of those that are held out."""
        router = self.routers[layer]
        kinds = {
            name: calibrated if recipe is None else self.child.router_of(recipe, router.name)
            for name, recipe in self._kinds.items()
        }
        heard: dict[str, list[torch.Tensor]] = {name: [] for name in kinds}
        names = list(kinds)

        def run_one(layer: DecoderLayer, number: int, run: Any) -> torch.Tensor:
            behind = number - self._calibrating
            if behind < 0:
                if number == 0:
                    router.put(calibrated)
                output: torch.Tensor = run()
                return output
            name = names[behind // self._held_out]
            if behind % self._held_out == 0:
                router.put(kinds[name])
            states, after = router.inputs(run)
            heard[name].append(log_routing(states, kinds[name].to(states.device)).cpu())
            assert after is not None
            return after

        self._states = self.child.run_span(layer, layer + 1, self._states, run_one)
        self.position = layer + 1
        self.known[layer] = hashlib.sha256(_bytes(calibrated)).hexdigest()
        return self._own.row(layer, router.per_token, heard)

    def _stored_router(self, layer: int, values: bytes) -> torch.Tensor:
        like = self.child.router_of(self._recipe, self.routers[layer].name)
        flat = torch.frombuffer(bytearray(values), dtype=torch.uint8).view(like.dtype)
        return flat.view(like.shape)


def _bytes(router: torch.Tensor) -> bytes:
    return router.contiguous().view(torch.uint8).numpy().tobytes()


def _told(solution: Solution) -> dict[str, Any]:
    return {
        "iterations": solution.iterations,
        "residual": solution.residual,
        "start": solution.start,
    }
