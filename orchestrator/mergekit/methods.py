"""The merge methods of mergekit 0.1.5: their parameters, what they do with a base, and our names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

REQUIRED = object()
"""The default of a parameter that has none."""


@dataclass(frozen=True, slots=True)
class PeerParameter:
    """A parameter as mergekit knows it."""

    name: str
    kind: Literal["number", "whole", "flag"]
    scope: Literal["shared", "input", "task_vector"]
    """One number for all models; one for each; one for each but the base."""
    default: Any = REQUIRED
    own: str | None = None
    """Its name here; None: it changes nothing but memory, or nothing at all."""
    choices: tuple[str, str] | None = None
    """What false and true are called here, where a flag is a choice."""


@dataclass(frozen=True, slots=True)
class PeerMethod:
    """A method as mergekit knows it."""

    own: str
    """Its name here."""
    base: Literal["ignored", "optional", "required"]
    """"ignored": a base is one more model that is merged."""
    parameters: tuple[PeerParameter, ...] = ()
    without_task_vectors: bool = False
    """Whether the base alone may be given; it is then the result."""

    def parameter(self, name: str) -> PeerParameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


def _number(
    name: str, scope: Any, default: Any = REQUIRED, own: str | None = None
) -> PeerParameter:
    return PeerParameter(name, "number", scope, default, own or name)


def _flag(name: str, default: bool, own: str | None = None) -> PeerParameter:
    return PeerParameter(name, "flag", "shared", default, own or name)


INT8_MASK = PeerParameter("int8_mask", "flag", "shared", False)


def _family(own: str, normalize: bool, rescale: bool, *more: PeerParameter) -> PeerMethod:
    """A method that merges sparse task vectors."""
    return PeerMethod(
        own,
        "required",
        (
            _number("weight", "task_vector"),
            _number("density", "task_vector", 1.0),
            _number("lambda", "shared", 1.0),
            _flag("normalize", normalize),
            PeerParameter("rescale", "flag", "shared", rescale, "rescale", ("none", "l1")),
            INT8_MASK,
            *more,
        ),
        without_task_vectors=True,
    )


GAMMA = _number("gamma", "task_vector", 0.01)
EPSILON = _number("epsilon", "task_vector", 0.15)

PEER_METHODS = {
    "linear": PeerMethod(
        "linear", "ignored", (_number("weight", "input"), _flag("normalize", True))
    ),
    "slerp": PeerMethod("slerp", "required", (_number("t", "shared"),)),
    "nuslerp": PeerMethod(
        "nuslerp",
        "optional",
        (
            _number("weight", "task_vector"),
            _flag("nuslerp_flatten", True, "flatten"),
            # Refused where it would mean anything: without nuslerp_flatten.
            PeerParameter("nuslerp_row_wise", "flag", "shared", False),
        ),
    ),
    "multislerp": PeerMethod(
        "multislerp",
        "optional",
        (
            _number("weight", "task_vector"),
            _flag("normalize_weights", True),
            _number("eps", "shared", 1e-8),
        ),
    ),
    "karcher": PeerMethod(
        "karcher",
        "ignored",
        (
            PeerParameter("max_iter", "whole", "shared", 10, "max_iter"),
            _number("tol", "shared", 1e-5),
        ),
    ),
    "task_arithmetic": PeerMethod(
        "task_arithmetic",
        "required",
        (
            _number("weight", "task_vector"),
            _number("lambda", "shared", 1.0),
            _flag("normalize", False),
            PeerParameter("density", "number", "task_vector", 1.0),
            PeerParameter("rescale", "flag", "shared", False),
            INT8_MASK,
        ),
        without_task_vectors=True,
    ),
    "ties": _family("ties", normalize=True, rescale=False),
    "dare_linear": _family("dare_linear", normalize=False, rescale=True),
    "dare_ties": _family("dare_ties", normalize=False, rescale=True),
    "breadcrumbs": _family("breadcrumbs", False, False, GAMMA),
    "breadcrumbs_ties": _family("breadcrumbs_ties", False, False, GAMMA),
    "della": _family("della", True, True, EPSILON),
    "della_linear": _family("della_linear", False, True, EPSILON),
    "sce": PeerMethod(
        "sce",
        "required",
        (_number("select_topk", "shared", 1.0), INT8_MASK),
        without_task_vectors=True,
    ),
    "model_stock": PeerMethod("model_stock", "required", (_flag("filter_wise", False),)),
    "nearswap": PeerMethod("nearswap", "required", (_number("t", "shared"),)),
    "arcee_fusion": PeerMethod("arcee_fusion", "required"),
    "ram": PeerMethod(
        "ram", "required", (_number("epsilon", "shared", 1e-5),), without_task_vectors=True
    ),
    "ramplus_tl": PeerMethod(
        "ramplus",
        "required",
        (
            _number("r", "shared", 0.1),
            _number("alpha", "shared", 0.2),
            _number("epsilon", "shared", 1e-5),
        ),
        without_task_vectors=True,
    ),
    "passthrough": PeerMethod("passthrough", "ignored", (_number("scale", "input", 1.0),)),
}
