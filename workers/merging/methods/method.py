"""What a merge method is: declared parameters, and a function on one slice of one tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from workers.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = sys.float_info.max
"""An unbounded parameter is finite all the same."""

Values = dict[str, Any]
"""A tensor's parameters, resolved: a float, a text, or a float per parent."""

Scope = Literal["shared", "per_parent", "flag", "choice", "parent_name"]
"""A number; a number for each parent; 1 or 0 (true or false); one of `choices`; a parent."""

Grain = Literal["element", "row", "matrix"]
"""What a method must see at once: any elements; whole rows; the whole tensor. It decides how a tensor
can be cut into merge units and shared between workers."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method."""

    name: str
    scope: Scope
    low: float = float("-inf")
    high: float = float("inf")
    default: float | str | None = None
    """None: the recipe must give it."""
    choices: tuple[str, ...] = ()


@dataclass(slots=True)
class Slice:
    """A piece of one tensor, as a method sees it: fp32 tensors of one shape.

    The shape is flat, `[n]`, for the grain "element"; `[rows, columns]` for the others, where a vector
    is one row, and further dimensions (a convolution's) count as columns.
    """

    parents: dict[str, Tensor]
    """Values of each parent, in the recipe's order. Buffers: a method may overwrite them."""
    base: Tensor | None
    """Values of the base; not to be overwritten. None if the method does not use it."""
    out: Tensor
    """Where the result goes; holds arbitrary values before."""
    statistic: Any
    """What the method's statistic found for the whole tensor; None if it declares none."""
    keep_mask: Callable[[str, float | Tensor], Tensor]
    """`keep_mask(parent, probability)`: 1.0 or 0.0, drawn for these very elements of that parent."""
    scratch: Callable[[int], Tensor]
    """`scratch(i)`: this thread's i-th spare buffer, of the slice's shape; holds arbitrary values."""
    is_matrix: bool
    """Whether the tensor is a linear map `[out, in]`: no vector, kernel, embedding, head or router."""
    is_transposed: bool = False
    """Whether that map is stored `[in, out]`, as the fused experts of some architectures are."""


class Statistic(Protocol):
    """A fact about a whole tensor of all parents that a method needs before it can merge a slice.

    The tensor is cut into stretches on a fixed grid, each with an instance of its own, and these are
    merged in order: sums depend neither on who computes them nor on how many do.
    """

    def update(self, piece: Slice) -> None:
        """Take in the next slice of the stretch. May overwrite `parents` and `out`."""

    def merge(self, other: Any) -> None:
        """Add what another instance found on the next stretch."""

    def finish(self) -> Any:
        """The fact, small; handed to the method as `Slice.statistic`."""


@dataclass(frozen=True)
class MergeMethod:
    """A registered method."""

    name: str
    summary: str
    """One line with the formula's source."""
    parameters: tuple[Parameter, ...]
    merge: Callable[[Slice, Values], None]
    """Fills `Slice.out` from parents and base, by operations that round once each: torch fuses the
    multiplication of `add_(x, alpha=a)` into the addition on some processors and not on others."""
    check: Callable[[Values], str | None] | None = None
    """Says what is wrong with parameters that are good one by one but not together; None: nothing."""
    uses_base: Literal["never", "optional", "always"] = "never"
    """Whether it merges differences to a base; "optional": if the recipe has one."""
    parents: tuple[int, int | None] = (1, None)
    """Least and greatest number of parents; None is any number."""
    least_task_vectors: int = 0
    """How many parents must differ from the base for the method to be what its name says."""
    grain: Grain = "element"
    statistic: Callable[[Values], Statistic | None] | None = None
    """Makes an instance, or None where these values need no statistic and the tensor no scan."""
    statistic_grain: Literal["element", "row"] = "element"
    statistic_parameters: tuple[str, ...] = ()
    """Parameters that the statistic depends on. Without any it is computed once for all candidates."""
    copies: Callable[[Values], bool] | None = None
    """Whether, with these values, it hands over one parent's stored bits instead of computing."""
    post: bool = False
    """Whether it is a post-step: it refines in place what another method has put into `out`."""
    coefficients: Callable[[Values], dict[str, float]] | None = None
    """Each parent's factor, if the result is the sum of factor times parent and nothing more; a method
    that always uses the base gives it what the factors leave to 1. Such methods compose."""
    exact: bool = True
    """Whether its bits are the same on every processor; LAPACK's are not."""

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    def resolve(self, given: dict[str, Any], parents: tuple[str, ...], has_base: bool) -> Values:
        """Check a rule's parameters and spread them over the parents. Raises `BadInputError`."""
        self.check_inputs(parents, has_base)
        for name in given:
            if self.parameter(name) is None:
                known = ", ".join(parameter.name for parameter in self.parameters) or "none"
                raise BadInputError(
                    f"method {self.name}: there is no parameter {name!r}; it has: {known}"
                )
        values = {
            parameter.name: self._resolve_one(parameter, given.get(parameter.name), parents)
            for parameter in self.parameters
        }
        problem = self.check(values) if self.check is not None else None
        if problem is not None:
            raise BadInputError(f"method {self.name}: {problem}")
        return values

    def check_inputs(self, parents: tuple[str, ...], has_base: bool) -> None:
        """Raise `BadInputError` unless the method can merge so many parents, with or without a base."""
        least, most = self.parents
        if len(parents) < least or (most is not None and len(parents) > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            raise BadInputError(
                f"method {self.name} merges {wanted} parents, not {len(parents)}: choose another "
                "method or other parents"
            )
        if self.uses_base == "always" and not has_base:
            raise BadInputError(
                f"method {self.name} merges differences to a base: name the parents' common "
                "ancestor as `base`"
            )

    def _resolve_one(self, parameter: Parameter, given: Any, parents: tuple[str, ...]) -> Any:
        where = f"method {self.name}: parameter {parameter.name!r}"
        if parameter.scope == "parent_name":
            if given not in parents:
                raise BadInputError(f"{where}: {given!r} is none of the parents {list(parents)}")
            return given
        if parameter.scope == "choice":
            chosen = parameter.default if given is None else given
            if chosen not in parameter.choices:
                raise BadInputError(
                    f"{where}: {chosen!r} is none of {', '.join(parameter.choices)}"
                )
            return chosen
        if parameter.scope == "flag":
            flag = parameter.default if given is None else given
            if type(flag) not in (bool, int, float) or flag not in (0, 1):
                raise BadInputError(f"{where}: {flag!r} is neither 1 nor 0 (true nor false)")
            return float(flag)
        if parameter.scope == "shared":
            return _check_number(parameter, given, where)
        table = given if isinstance(given, dict) else dict.fromkeys(parents, given)
        for name in table:
            if name not in parents:
                raise BadInputError(f"{where}: {name!r} is none of the parents {list(parents)}")
        return {
            name: _check_number(parameter, table.get(name), f"{where} for {name!r}")
            for name in parents
        }


METHODS: dict[str, MergeMethod] = {}
PLAN_METHODS: dict[str, MergeMethod] = {}
"""Those that recipes can name although they merge nothing themselves: a plan puts others in their place."""


def register(method: MergeMethod) -> MergeMethod:
    """Make a method known by its name."""
    assert method.name not in METHODS, method.name
    METHODS[method.name] = method
    return method


def get_method(name: str) -> MergeMethod:
    """The method of that name. Raises `BadInputError` listing those there are."""
    found = METHODS.get(name) or PLAN_METHODS.get(name)
    if found is None:
        known = ", ".join(sorted(METHODS | PLAN_METHODS))
        raise BadInputError(f"method {name!r} is none of {known}")
    return found


def _check_number(parameter: Parameter, given: Any, where: str) -> float:
    if given is None:
        if parameter.default is None:
            raise BadInputError(f"{where} is missing")
        return float(parameter.default)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise BadInputError(f"{where}: {given!r} is not a number")
    low, high = max(parameter.low, -LARGEST), min(parameter.high, LARGEST)
    if not low <= given <= high:
        raise BadInputError(f"{where}: {given} is outside [{low:g}, {high:g}]")
    return float(given)
