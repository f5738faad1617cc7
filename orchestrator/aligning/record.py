"""What an alignment leaves behind: `alignment.json` and the lineage of the aligned mother."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.aligning.architecture_mapper import LayerMatch
from orchestrator.descent.lineage import (
    LINEAGE_FORMAT,
    hub_source,
    licence_of,
    package_version,
)
from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.merging.plan import Plan

if TYPE_CHECKING:
    from workers.merging.transplant import NeuronMatching, Transplanted

ALIGNMENT_FORMAT = 1

NOT_ACCOUNTED = (
    "each model has a basis of its own for its hidden states, and no change of basis is fitted: neurons "
    "match only as far as the two happen to agree, which the correlations measure",
    "the gains of the norm before the feed-forward network are the father's",
)
"""What holds of every alignment."""


@dataclass
class Coverage:
    """How much of the father is changed, in elements."""

    changed: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    """Both by component."""

    @property
    def total(self) -> float:
        """The share of all elements."""
        return sum(self.changed.values()) / max(sum(self.elements.values()), 1)

    def to_dict(self) -> dict[str, Any]:
        shares = {
            name: self.changed[name] / count for name, count in self.elements.items() if count
        }
        return {"total": self.total, "by_component": shares}

    def __str__(self) -> str:
        parts = [f"{name} {n / self.elements[name]:.1%}" for name, n in self.changed.items() if n]
        return f"{self.total:.2%} of all parameters" + (f" ({', '.join(parts)})" if parts else "")


def alignment_head(
    father: Checkpoint,
    mother: Checkpoint,
    threshold: float,
    least_correlation: float | None,
    coverage: Coverage,
) -> dict[str, Any]:
    """What `alignment.json` says before the layers."""
    return {
        "format": ALIGNMENT_FORMAT,
        "software": {"darwin": package_version()},
        "father": _source(father),
        "mother": _source(mother),
        "threshold": threshold,
        "least_correlation": least_correlation,
        "components": {
            name: "neuron_matched" if name == "mlp" else "skip" for name in coverage.elements
        },
        "coverage": coverage.to_dict(),
        "not_accounted": list(NOT_ACCOUNTED),
    }


def layer_record(father: ArchitectureMap, match: LayerMatch) -> dict[str, Any]:
    """What the mapper says of a layer."""
    gate = father.by_name.get(f"layers.{match.layer}.mlp.gate_proj.weight")
    return {
        "layer": match.layer,
        "mother_layer": match.mother_layer,
        "compatibility": match.compatibility,
        "option": match.option,
        "reason": match.reason,
        "not_accounted": list(match.not_accounted),
        "neurons": gate.shape[0] if gate else 0,
        "moved": 0,
        "correlation": None,
    }


def moved_record(found: NeuronMatching) -> dict[str, Any]:
    """What was measured of a layer whose neurons move."""
    return {
        "moved": found.moved,
        "correlation": float(found.correlation[found.mother >= 0].mean()),
        "flipped": int(found.flipped.sum()),
        "scale": found.scale,
        # Signed, and counted from 1, so that 0 is left for the places where the father's stay.
        "places": ((found.mother + 1) * (1 - 2 * found.flipped)).tolist(),
    }


def measure_coverage(plan: Plan, written: Transplanted) -> Coverage:
    """Counted from the bytes that were written."""
    coverage = Coverage()
    for tensor in plan.child.tensors:
        for counts, count in (
            (coverage.changed, written.changed.get(tensor.name, 0)),
            (coverage.elements, tensor.elements),
        ):
            counts[tensor.component] = counts.get(tensor.component, 0) + count
    return coverage


def build_alignment_lineage(
    plan: Plan,
    written: Transplanted,
    father: Checkpoint,
    mother: Checkpoint,
    alignment: dict[str, Any],
    files: dict[str, str],
) -> dict[str, Any]:
    """As that of a merge: what `darwin verify` reads. Identity is that of the alignment."""
    summary = {key: value for key, value in alignment.items() if key != "layers"}
    moved = {
        layer["layer"]: layer["moved"] / layer["neurons"]
        for layer in alignment["layers"]
        if layer["moved"]
    }
    tensors = []
    for tensor in plan.child.tensors:
        method: str = "passthrough"
        parameters: dict[str, Any] = {"source": "father", "scale": 1.0}
        if tensor.component == "mlp" and tensor.layer in moved:
            # As weights, so that whoever adds up the parents' shares in a child can do so here.
            share = moved[tensor.layer]
            method = "neuron_matched"
            parameters = {"weight": {"father": 1 - share, "mother": share}}
        tensors.append(
            {
                "name": tensor.name,
                "component": tensor.component,
                "layer": tensor.layer,
                "elements": tensor.elements,
                "method": method,
                "parameters": parameters,
                "changed": {"father": written.changed.get(tensor.name, 0)},
                "not_finite": written.not_finite.get(tensor.name, 0),
            }
        )
    return {
        "format": LINEAGE_FORMAT,
        "software": alignment["software"],
        "parents": [
            {"name": "father", **_source(father)},
            {"name": "mother", **_source(mother)},
        ],
        "base": None,
        "recipe_id": hashlib.sha256(alignment_bytes(alignment)).hexdigest(),
        "recipe": {"alignment": summary},
        "files": files,
        "tensors": tensors,
    }


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "fingerprint": checkpoint.fingerprint,
        "license": licence_of(checkpoint),
        **hub_source(checkpoint),
    }


def alignment_bytes(alignment: dict[str, Any]) -> bytes:
    """The file: a line for each layer."""
    head = json.dumps({key: v for key, v in alignment.items() if key != "layers"}, indent=1)
    layers = ",\n".join(json.dumps(layer) for layer in alignment["layers"])
    return f'{head[:-2]},\n "layers": [\n{layers}\n]\n}}\n'.encode()
