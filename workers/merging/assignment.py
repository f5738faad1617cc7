"""How a rule of a recipe merges one tensor: method, parameters and parents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workers.checkpoints import LogicalTensor
from workers.errors import BadInputError
from workers.merging.methods import METHODS, Grain, MergeMethod, get_method
from workers.merging.methods.as_experts import AS_EXPERTS
from workers.merging.methods.method import Values
from workers.merging.parameters import parse_parameters, selectors_of, value_at, varies
from workers.merging.recipe import CARRIED, PostStep, Recipe, Rule

if TYPE_CHECKING:
    from workers.merging.plan import Plan

NO_LINEAR_MAPS = ("embedding", "lm_head", "router", "norm")
"""Components whose two-dimensional tensors are tables, not maps between hidden states."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """How one tensor is merged."""

    method: MergeMethod
    values: Values
    parents: tuple[str, ...]
    """Those that the method sees, in the recipe's order."""
    post: MergeMethod | None = None
    post_values: Values | None = None
    rows: tuple[Assignment, ...] = ()
    """How each row of a router is merged, where the method is as_experts."""

    @property
    def copies(self) -> bool:
        """Whether the child gets one parent's stored bits, if it has the father's dtype."""
        copies = self.method.copies
        return self.post is None and copies is not None and copies(self.values)

    def grain(self, tensor: LogicalTensor) -> Grain:
        """What must be merged at once of `tensor`; what is no linear map needs no whole matrix."""
        grain = self.method.grain if self.post is None else self.post.grain
        return "row" if grain == "matrix" and not is_linear_map(tensor) else grain

    def uses_base(self, has_base: bool) -> bool:
        if self.rows:
            return any(row.uses_base(has_base) for row in self.rows)
        steps = [self.method, *([self.post] if self.post else [])]
        return has_base and any(step.uses_base != "never" for step in steps)


class RuleOnPlan:
    """One rule of a recipe, its parameters worked out for each tensor that it is for."""

    def __init__(self, plan: Plan, recipe: Recipe, rule: Rule) -> None:
        self._plan = plan
        self._where = rule.where
        self.parents = rule.parents or tuple(parent.name for parent in recipe.parents)
        self._has_base = recipe.base is not None
        steps: list[Rule | PostStep] = [rule, *([rule.post] if rule.post else [])]
        for number, step in enumerate(steps):
            _check_place(get_method(step.method), is_post=number > 0)
        if rule.method == AS_EXPERTS.name and (rule.post or rule.parents):
            raise BadInputError(
                "method as_experts: has no post-step and no parents but its experts'"
            )
        self._steps = [
            (get_method(step.method), parse_parameters(step.parameters, f"method {step.method}"))
            for step in steps
        ]
        self._check_cases()
        self._varies = any(varies(parameters) for _, parameters in self._steps)
        self._same: dict[tuple[str, ...], Assignment] = {}
        if not self._varies and not plan.form.layers:
            # Also where other rules hide this one: what cannot work is an error.
            self.assignment(plan.child.tensors[0], self.parents)

    def _check_cases(self) -> None:
        """Raise `BadInputError` for a case that can match no tensor."""
        for method, parameters in self._steps:
            for name, value in parameters.items():
                for where in selectors_of(value):
                    key = self._plan.unmatched_key(where)
                    if key is not None:
                        raise BadInputError(
                            f"recipe: the rule for where: {self._where}: method {method.name}: parameter "
                            f"{name!r}: the case for where: {where}: its {key} match no tensor of "
                            f"{self._plan.layout.location}: correct the case, or leave it out"
                        )

    def assignment(self, tensor: LogicalTensor, parents: tuple[str, ...]) -> Assignment:
        if self._varies:
            return self._assign(tensor, parents)
        if parents not in self._same:
            self._same[parents] = self._assign(tensor, parents)
        return self._same[parents]

    def _assign(self, tensor: LogicalTensor, parents: tuple[str, ...]) -> Assignment:
        depth = self._plan.depth(tensor, self._where)
        values = []
        for method, parameters in self._steps:
            given = {
                name: _of_parents(value_at(value, tensor, depth), self.parents, parents)
                for name, value in parameters.items()
            }
            try:
                values.append(method.resolve(given, parents, self._has_base))
            except BadInputError as error:
                place = f"tensor {tensor.name!r}: " if self._varies else ""
                raise BadInputError(f"{place}{error}") from error
        read = (values[0]["source"],) if "source" in values[0] else parents
        way = Assignment(self._steps[0][0], values[0], read)
        return (
            way if len(values) == 1 else replace(way, post=self._steps[1][0], post_values=values[1])
        )


def carried(
    tensor: LogicalTensor, parents: tuple[str, ...], present: tuple[str, ...]
) -> Assignment:
    """The assignment of what no rule is for: the father's bits, or those of the first parent that is
    `present` in this slice of layers."""
    carrier = parents[0] if tensor.layer is None or parents[0] in present else present[0]
    return Assignment(get_method("passthrough"), {"source": carrier, "scale": 1.0}, (carrier,))


def _of_parents(value: Any, all_parents: tuple[str, ...], parents: tuple[str, ...]) -> Any:
    """A table's values for `parents`; names that are no parent at all stay, to be refused."""
    if not isinstance(value, dict) or all_parents == parents:
        return value
    return {name: v for name, v in value.items() if name in parents or name not in all_parents}


def _check_place(method: MergeMethod, is_post: bool) -> None:
    if method.post and not is_post:
        raise BadInputError(
            f"method {method.name} refines what another method has merged: name it as the `post` of a "
            "rule, beside the rule's `method`"
        )
    if is_post and not method.post:
        known = ", ".join(name for name, other in METHODS.items() if other.post)
        raise BadInputError(f"method {method.name} is no post-step; there is: {known}")


def is_linear_map(tensor: LogicalTensor) -> bool:
    """Whether it is a weight `[out, in]` that maps hidden states to hidden states."""
    return (
        len(tensor.shape) == 2
        and min(tensor.shape) > 1
        and tensor.component not in (*NO_LINEAR_MAPS, *CARRIED)
    )
