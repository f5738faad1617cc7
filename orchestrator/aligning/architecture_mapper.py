"""The architecture mapper: which layers of a mother of another architecture stand for the father's.

It decides from headers and configurations alone. `Comp(i, j) = 0.5 Type + 0.3 Dim + 0.2 Param` is the
published score of father layer i and mother layer j; what Type, Dim and Param are, the threshold and the
constraints of the greedy matching are not public: the definitions here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.weight_meaning import SAME_ACTIVATION
from workers.checkpoints import ArchitectureMap, LogicalTensor
from workers.checkpoints.stacking import text_of

TYPE_WEIGHT, DIM_WEIGHT, PARAM_WEIGHT = 0.5, 0.3, 0.2

LEAST_COMPATIBILITY = 0.5
"""Layers whose score is lower are not matched."""

FURTHEST_DEPTH = 0.25
"""Layers whose places in their models, from 0 to 1, are further apart are not matched."""

ROLES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layer:
    """What headers and configuration say of one decoder layer."""

    mixer: str
    """As configurations call it: full_attention, sliding_attention, linear_attention."""
    feed_forward: Literal["dense", "experts", "none"]
    activation: str | None
    hidden: int
    intermediate: int
    """Neurons of the feed-forward network, or of one expert."""
    heads: int
    parameters: int
    norms: frozenset[str] = frozenset()
    scaled: bool = False
    """Whether a stored factor scales the layer's output."""
    matrices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The stored tensors of a dense feed-forward network, by the rest of the name: their shapes."""


@dataclass(frozen=True)
class LayerMatch:
    """What becomes of one layer of the father."""

    layer: int
    mother_layer: int | None
    compatibility: float | None
    option: Literal["neuron_matched", "skip"]
    """Of its feed-forward network; all other components are always skipped: the father's are kept."""
    reason: str | None = None
    """Why it is skipped."""
    not_accounted: tuple[str, ...] = ()
    """What differs around the two feed-forward networks, and is not made up for."""


def map_layers(
    father: ArchitectureMap, mother: ArchitectureMap, threshold: float = LEAST_COMPATIBILITY
) -> list[LayerMatch]:
    """What becomes of each layer of the father, in order."""
    own, hers = describe_layers(father), describe_layers(mother)
    pairs = match_layers(own, hers, threshold)
    alone = f"no layer of the mother is free, near in depth and compatible to {threshold:g}"
    found = []
    for number, layer in enumerate(own):
        if number not in pairs:
            found.append(LayerMatch(number, None, None, "skip", alone))
            continue
        other = hers[pairs[number]]
        reason = why_not_matched(layer, other)
        found.append(
            LayerMatch(
                number,
                pairs[number],
                compatibility(layer, other),
                "neuron_matched" if reason is None else "skip",
                reason,
                () if reason else tuple(differences(layer, other)),
            )
        )
    return found


def compatibility(one: Layer, other: Layer) -> float:
    """`0.5 Type + 0.3 Dim + 0.2 Param`, from 0 to 1.

    Type: the share of the mixer, the kind of feed-forward network and its activation function that are
    equal. Dim: the mean, over hidden size, neurons and heads, of smaller / larger. Param: smaller /
    larger number of parameters.
    """
    kinds = [(one.mixer, other.mixer), (one.feed_forward, other.feed_forward)]
    kinds.append((one.activation or "", other.activation or ""))
    sizes = [(one.hidden, other.hidden), (one.intermediate, other.intermediate)]
    sizes.append((one.heads, other.heads))
    return (
        TYPE_WEIGHT * sum(a == b for a, b in kinds) / len(kinds)
        + DIM_WEIGHT * sum(_ratio(a, b) for a, b in sizes) / len(sizes)
        + PARAM_WEIGHT * _ratio(one.parameters, other.parameters)
    )


def match_layers(
    own: Sequence[Layer], hers: Sequence[Layer], threshold: float = LEAST_COMPATIBILITY
) -> dict[int, int]:
    """Father layer -> mother layer, greedily: the most compatible pair first, then the nearest in depth.

    Each layer is matched once at most, the order of the layers is kept, and both lie within
    `FURTHEST_DEPTH` of one another, the middle of a layer being its place in the model.
    """
    pairs = []
    for i, layer in enumerate(own):
        for j, other in enumerate(hers):
            distance = abs((i + 0.5) / len(own) - (j + 0.5) / len(hers))
            score = compatibility(layer, other)
            if score >= threshold and distance <= FURTHEST_DEPTH:
                pairs.append((-score, distance, i, j))
    matched: dict[int, int] = {}
    for _, _, i, j in sorted(pairs):
        if all((i - k) * (j - m) > 0 for k, m in matched.items()):
            matched[i] = j
    return dict(sorted(matched.items()))


def describe_layers(parent: ArchitectureMap) -> list[Layer]:
    """The decoder layers of a checkpoint."""
    text = text_of(parent.checkpoint.config)
    by_layer: dict[int, list[LogicalTensor]] = {number: [] for number in range(parent.layers)}
    for tensor in parent.tensors:
        if tensor.layer is not None:
            by_layer[tensor.layer].append(tensor)
    return [_describe(number, tensors, text) for number, tensors in by_layer.items()]


def why_not_matched(one: Layer, other: Layer) -> str | None:
    """Why the neurons of two matched layers cannot be matched; None if they can."""
    for whose, layer in (("father's", one), ("mother's", other)):
        if layer.feed_forward == "experts":
            return (
                f"the {whose} feed-forward is a mixture of experts: experts are no neurons to match"
            )
        if layer.feed_forward == "none":
            return f"the {whose} layer has no feed-forward network"
        if set(layer.matrices) != {f"{role}.weight" for role in ROLES}:
            stored = ", ".join(sorted(layer.matrices))
            return f"the {whose} feed-forward is stored as {stored}, not as gate, up and down alone"
        wide, tall = (layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate)
        if [layer.matrices[f"{role}.weight"] for role in ROLES] != [wide, wide, tall] or 0 in wide:
            return f"the shapes of the {whose} gate, up and down do not fit one another"
    if one.hidden != other.hidden:
        return (
            f"the father's hidden size is {one.hidden}, the mother's {other.hidden}: her neurons read "
            "and write states of another size"
        )
    return None


def differences(one: Layer, other: Layer) -> list[str]:
    """What differs around two feed-forward networks whose neurons are matched."""
    found = []
    if one.activation != other.activation:
        found.append(f"activation function: {other.activation} neurons run with {one.activation}")
    if (mine := _norm_before(one)) != (hers := _norm_before(other)):
        found.append(f"norm before: neurons behind {hers} now read behind {mine}")
    after = "post_feedforward_layernorm"
    if (after in one.norms) != (after in other.norms):
        whose = "the father" if after in one.norms else "the mother"
        found.append(f"norm behind: only {whose} has {after}")
    if one.scaled != other.scaled:
        found.append(f"layer_scalar: only {'the father' if one.scaled else 'the mother'} has one")
    return found


def _norm_before(layer: Layer) -> str:
    own = "pre_feedforward_layernorm"
    return own if own in layer.norms else "post_attention_layernorm"


def _describe(number: int, tensors: list[LogicalTensor], text: dict[str, Any]) -> Layer:
    start = f"layers.{number}."
    components = {tensor.component for tensor in tensors}
    dense = {
        tensor.name.removeprefix(f"{start}mlp."): tensor.shape
        for tensor in tensors
        if tensor.component == "mlp"
    }
    kind: Literal["dense", "experts", "none"] = "dense" if dense else "none"
    gate = dense.get("gate_proj.weight")
    if "expert" in components:
        kind = "experts"
        gate = next((t.shape for t in tensors if t.component == "expert"), gate)
    neurons, hidden = gate if gate and len(gate) == 2 else (0, int(text.get("hidden_size") or 0))
    names = {tensor.name.removeprefix(start) for tensor in tensors}
    linear = "linear_attention" in components
    activation = text.get("hidden_activation") or text.get("hidden_act")
    heads = text.get("linear_num_value_heads" if linear else "num_attention_heads")
    return Layer(
        mixer=_mixer(number, linear, text),
        feed_forward=kind,
        activation=SAME_ACTIVATION.get(str(activation), str(activation)) if activation else None,
        hidden=hidden,
        intermediate=neurons,
        heads=heads if type(heads) is int else 0,
        parameters=sum(tensor.elements for tensor in tensors),
        norms=frozenset(name.removesuffix(".weight") for name in names if "norm" in name),
        scaled="layer_scalar" in names,
        matrices=dense,
    )


def _mixer(number: int, linear: bool, text: dict[str, Any]) -> str:
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and number < len(kinds):
        return str(kinds[number])
    if linear:
        return "linear_attention"
    period = text.get("sliding_window_pattern")
    if type(period) is int and period > 0 and (number + 1) % period:
        return "sliding_attention"
    return "full_attention"


def _ratio(one: int, other: int) -> float:
    """Smaller / larger; 1 if both are 0."""
    return min(one, other) / max(one, other) if max(one, other) else 1.0
