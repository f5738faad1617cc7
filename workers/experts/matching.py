"""Matching: which expert of a donor belongs to which of the father's, layer by layer.

Fine-tunes keep their experts' numbers; donors that were permuted, or trained apart from an early ancestor,
do not. Experts are compared by their weights, or by what they give for the same hidden states, and each
of the donor's is given one place so that the sum of all similarities is the greatest (a linear assignment).

Similarity is the cosine of what is left of two experts when the mean of all experts of their layer and model
is taken away: experts grown from one dense layer are all alike before. By weights it is the mean of the
cosines of the matrices and of the rows of the router, so that each counts alike, whatever its size. This
definition is our own.

With E experts of M elements a layer costs 2 E^2 M operations by weights and reads E M elements of each model
once: for Qwen3.5-397B-A17B (512 x 12.6 M) 6.6 TFLOP and 2 x 12.9 GB. By outputs of T tokens, each of which
costs 2 M operations in every expert, it is 4 T E M + 2 E^2 T H: 1.8 TFLOP for 64 tokens, and the same reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from scipy.optimize import linear_sum_assignment

from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.errors import BadInputError
from workers.experts.quality import LayerMatching, describe
from workers.merging.expert_order import ExpertPlaces
from workers.merging.sources import Source

BLOCK_BYTES = 128 << 20
"""So much of each model, in fp32, is compared at once: a stretch of every expert's matrix."""

OUTPUT_BYTES = 512 << 20
"""Outputs of all experts of a model that are kept, in fp32: for so many tokens as that allows."""

NOTHING = 1e-12
"""An expert that differs from the mean by this share of its squared length is the mean."""

DECIMALS = 6
"""Of a similarity: beyond lies the rounding of sums in fp32, which differs between processors."""

GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@dataclass
class Cosines:
    """The cosines between the experts of two models, as sums over the elements that they are compared by."""

    products: numpy.ndarray[Any, Any]
    """`[father's, donor's]`, of differences to the means."""
    squares: tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]
    """Squared lengths of the differences of each model's experts to their mean."""
    lengths: tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]
    """Squared lengths of the experts themselves."""

    @staticmethod
    def begin(experts: int) -> Cosines:
        """Nothing compared yet."""
        pairs = [(numpy.zeros(experts), numpy.zeros(experts)) for _ in range(2)]
        return Cosines(numpy.zeros((experts, experts)), *pairs)

    def add(self, father: torch.Tensor, donor: torch.Tensor) -> None:
        """Take in elements of all experts of both, fp32 `[experts, elements]`; they are overwritten."""
        for number, values in enumerate((father, donor)):
            self.lengths[number][:] += _squares(values)
            values.sub_(values.mean(dim=0))
            self.squares[number][:] += _squares(values)
        self.products += (father @ donor.T).double().cpu().numpy()

    def finish(self) -> numpy.ndarray[Any, Any]:
        """`[father's, donor's]`; 0 where an expert is no different from the mean of all."""
        (one, other), (whole, whole_other) = self.squares, self.lengths
        tells = numpy.outer(one > NOTHING * whole, other > NOTHING * whole_other)
        scale = numpy.sqrt(numpy.outer(one, other))
        found: numpy.ndarray[Any, Any] = numpy.zeros_like(scale)
        numpy.divide(self.products, scale, out=found, where=tells)
        return found


def _squares(values: torch.Tensor) -> numpy.ndarray[Any, Any]:
    lengths: numpy.ndarray[Any, Any] = (
        torch.linalg.vector_norm(values, dim=1).double().cpu().numpy()
    )
    lengths *= lengths
    return lengths


class Experts:
    """The experts of one layer of a checkpoint. Raises `BadInputError` if it has none there."""

    def __init__(self, checkpoint: Checkpoint, layer: int, source: Source | None = None) -> None:
        self.location = checkpoint.location
        self.layer = layer
        self.config = checkpoint.config
        self._source = source or Source(checkpoint)
        architecture = ArchitectureMap.of(checkpoint)
        places = ExpertPlaces({}, architecture, {})
        if layer not in places.experts:
            raise BadInputError(f"{self.location}: layer {layer} has no experts to match")
        names = places.matrices[layer]
        by_name = architecture.by_name
        self.matrices = [
            {name.partition(f".experts.{expert}.")[2]: by_name[name] for name in of}
            for expert, of in enumerate(names)
        ]
        """Of each expert: role -> matrix."""
        self.routers = [
            tensor
            for tensor in architecture.tensors
            if tensor.layer == layer and tensor.component == "router"
            if places.has_row_each(tensor)
            if len(tensor.shape) == 2 and tensor.shape[0] == len(names)  # no bias [1, E]
        ]

    def check_alike(self, other: Experts) -> None:
        """Raise `BadInputError` unless both have as many experts, of the same matrices."""
        if len(self.matrices) != len(other.matrices):
            raise BadInputError(
                f"layer {self.layer}: {self.location} has {len(self.matrices)} experts, {other.location} "
                f"{len(other.matrices)}: only as many can be matched"
            )
        shapes = [
            [{role: tensor.shape for role, tensor in of.items()} for of in one.matrices]
            for one in (self, other)
        ]
        for expert, (own, others) in enumerate(zip(*shapes, strict=True)):
            if own != others:
                raise BadInputError(
                    f"layer {self.layer}: expert {expert} of {self.location} has the matrices {own}, that of "
                    f"{other.location} {others}: they cannot be matched"
                )

    def stretch(self, role: str, first: int, values: torch.Tensor) -> torch.Tensor:
        """Elements from `first` on of every expert's matrix, into fp32 `values` `[experts, elements]`."""
        for expert, row in enumerate(values):
            row.copy_(self._source.read(self.matrices[expert][role], first, len(row)))
        return values

    def rows(self, router: LogicalTensor) -> torch.Tensor:
        """The rows of a router in fp32."""
        values = self._source.read(router, 0, router.elements)
        return values.to(torch.float32, copy=True).view(router.shape)

    def matrix(self, expert: int, role: str, device: str) -> torch.Tensor:
        """A whole matrix in fp32."""
        tensor = self.matrices[expert][role]
        values = self._source.read(tensor, 0, tensor.elements).view(tensor.shape)
        return values.to(device, torch.float32)


def match_by_weights(father: Experts, donor: Experts, device: str = "cpu") -> LayerMatching:
    """The donor's experts for the father's places, by all their matrices and the rows of the router.

    Memory: about `BLOCK_BYTES` of each model. Raises `BadInputError` if their experts are not alike, and for
    weights that are not finite.
    """
    father.check_alike(donor)
    experts = len(father.matrices)
    found = []
    for role, tensor in father.matrices[0].items():
        cosines = Cosines.begin(experts)
        step = max(1, min(tensor.elements, BLOCK_BYTES // (4 * experts)))
        buffers = [torch.empty((experts, step), device=device) for _ in range(2)]
        for first in range(0, tensor.elements, step):
            count = min(step, tensor.elements - first)
            cosines.add(*(
                model.stretch(role, first, buffer[:, :count])
                for model, buffer in zip((father, donor), buffers, strict=True)
            ))  # fmt: skip
        _check_finite(cosines, father, donor)
        found.append(cosines.finish())
    for own in father.routers:
        theirs = next((router for router in donor.routers if router.name == own.name), None)
        if theirs is not None and theirs.shape == own.shape:
            cosines = Cosines.begin(experts)
            cosines.add(father.rows(own), donor.rows(theirs))
            _check_finite(cosines, father, donor)
            found.append(cosines.finish())
    # A role in which all experts are the same tells nothing, and must not dilute what the others tell.
    telling = [cosines for cosines in found if cosines.any()] or found
    return assign(father.layer, numpy.mean(telling, axis=0))


def _check_finite(cosines: Cosines, *models: Experts) -> None:
    for model, lengths in zip(models, cosines.lengths, strict=True):
        broken = numpy.flatnonzero(~numpy.isfinite(lengths))
        if len(broken):
            raise BadInputError(
                f"{model.location}: expert {broken[0]} of layer {model.layer} has weights that are not finite"
            )


@torch.inference_mode()
def match_by_outputs(
    father: Experts, donor: Experts, states: torch.Tensor, device: str = "cpu"
) -> LayerMatching:
    """The donor's experts for the father's places, by what each gives for the same hidden states.

    `states` `[tokens, hidden]`: what the father's experts are given there. Every expert is asked about every
    token, whether or not the router would. Fewer tokens are taken, evenly spaced, where the outputs of all
    experts would need more than `OUTPUT_BYTES`. Memory: these of both models, and one expert. Raises
    `BadInputError` if the experts are not alike or of an unknown form, and for outputs that are not finite.
    """
    father.check_alike(donor)
    experts, hidden = len(father.matrices), states.shape[1]
    if set(father.matrices[0]) != set(GATED):
        raise BadInputError(
            f"layer {father.layer} of {father.location}: its experts have {sorted(father.matrices[0])}, not "
            f"{', '.join(GATED)}: match them by weights"
        )
    states = spread(states, max(1, OUTPUT_BYTES // (4 * experts * hidden))).to(device).float()
    outputs = [_outputs(model, states, device) for model in (father, donor)]
    cosines = Cosines.begin(experts)
    cosines.add(*outputs)
    return assign(father.layer, cosines.finish())


def spread(states: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, evenly spaced."""
    if len(states) <= most:
        return states
    return states[torch.arange(most) * len(states) // most]


def _outputs(model: Experts, states: torch.Tensor, device: str) -> torch.Tensor:
    """`[experts, tokens * hidden]`."""
    from transformers.activations import ACT2FN

    text = model.config.get("text_config") or model.config
    name = text.get("hidden_act") or text.get("hidden_activation") or "silu"
    activate = ACT2FN[name]
    outputs = torch.empty((len(model.matrices), states.numel()), device=device)
    for expert, row in enumerate(outputs):
        gate, up, down = (model.matrix(expert, role, device) for role in GATED)
        inner = activate(states @ gate.T) * (states @ up.T)
        torch.matmul(inner, down.T, out=row.view(len(states), -1))
        if not bool(row.isfinite().all()):
            raise BadInputError(
                f"{model.location}: expert {expert} of layer {model.layer} gives outputs that are not finite"
            )
    return outputs


def assign(layer: int, similarity: numpy.ndarray[Any, Any]) -> LayerMatching:
    """The places of the donor's experts, given `[father's, donor's]` similarities.

    Among equally good ones that which keeps the most experts where they are.
    """
    similarity = numpy.round(similarity, DECIMALS)
    if len(similarity) == 1:
        similarity = numpy.ones((1, 1))  # a single expert is the mean of all
    stays = numpy.eye(len(similarity)) * 10.0 ** -(DECIMALS + 3)
    _, order = linear_sum_assignment(similarity + stays, maximize=True)
    return describe(layer, tuple(map(int, order)), similarity)
