"""Recipes over children, written as recipes over these children's own parents.

Where both are weighted sums, so is the child of the children: the factors of each tensor multiply and add
up. Its recipe then names the original parents alone, and nothing has to be written in between. The bits are
not those of a merge of written children: these were rounded to their dtype once more. One rounding instead
of two is the point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.tensor_rules import cover
from workers.errors import BadInputError
from workers.merging import (
    METHODS,
    MergeMethod,
    ParentReference,
    Recipe,
    Rule,
    Selector,
    get_method,
)
from workers.merging.expert_order import orders_to_dict
from workers.merging.methods.as_experts import AS_EXPERTS
from workers.merging.plan import BASE, Assignment, Plan

DECIMALS = 12
"""Of a factor. Below lies only what floating point leaves of numbers that cancel or sum to 1."""
AFFINE = 1e-9
"""So close to 1 the factors of parents and base must add up, to be written with task vectors."""

Factors = Mapping[str, float]
"""Parent, or `base` -> what it is multiplied by."""

Row = tuple[tuple[str, float], ...]
"""Factors that can be compared: those that are not 0, in the parents' order, the base's last."""


def composing_methods() -> list[str]:
    """The names of the methods that compose."""
    return sorted(name for name, method in METHODS.items() if method.coefficients is not None)


def check_composes(method: MergeMethod, where: str) -> None:
    """Raise `BadInputError` that begins with `where` unless children of the method compose."""
    if method.coefficients is None:
        raise BadInputError(
            f"{where}: {method.name} does not compose: its child is no weighted sum of its parents, so "
            "what is bred from it cannot be written over them. Write that child and merge it, or "
            f"choose one of {', '.join(composing_methods())}"
        )


def compose(recipe: Recipe, children: Mapping[str, Recipe], plan: Plan) -> Recipe:
    """The recipe over the children's parents whose child is that of `recipe`, which merges the children.

    `children` by the names that `recipe` has for them; all are of the same parents, those of `plan`.
    Raises `BadInputError` for a method that does not compose, and for children of another form.
    """
    return Composer(children, plan).compose(recipe)


@dataclass(frozen=True)
class ByExpert:
    """The factors of a router whose rows are merged as their experts are."""

    rows: tuple[Row, ...]


Factored = Row | ByExpert
"""Of a tensor."""

AS_ITS_EXPERTS = ByExpert(())
"""Of a composed router: its rows' factors are those of the composed experts."""


class Composer:
    """Composes many recipes over the same children."""

    def __init__(self, children: Mapping[str, Recipe], plan: Plan) -> None:
        first = next(iter(children.values()))
        for name, child in children.items():
            if child.parents != first.parents:
                raise BadInputError(
                    f"{name}: is not of the same parents as the other children: these compose only if "
                    "all are recipes over the same ones, in the same order"
                )
            if orders_to_dict(child.experts) != orders_to_dict(first.experts):
                raise BadInputError(
                    f"{name}: pairs other experts than the other children, so they do not compose: write "
                    "that child and merge it"
                )
            if child.layers or child.dtype or child.shard_bytes or child.vocabulary:
                raise BadInputError(
                    f"{name}: changes its father's form (layers, dtype, shard_bytes or vocabulary), so it "
                    "does not compose: write that child and merge it"
                )
        self.parents = first.parents
        self._experts = first.experts
        self._plan = plan
        self._bases = {child.base for child in children.values()} - {None}
        # As each child has its father's layout, so has what is merged of them.
        self._over = Plan(dict.fromkeys(children, plan.father), plan.base)
        self._rows = {name: self._rows_of(name, child, plan) for name, child in children.items()}

    def compose(self, recipe: Recipe) -> Recipe:
        """See the function `compose`."""
        if recipe.layers or recipe.vocabulary or recipe.experts:
            raise BadInputError(
                "a recipe that changes layers or vocabulary or the order of experts does not compose"
            )
        base = self._common_base(recipe)
        over = self._rows_of("the recipe over them", recipe, self._over)
        made: dict[tuple[Factored, ...], Factored] = {}

        def row_of(name: str) -> Factored:
            # Few different rows: they are those of the rules, which hold for many tensors.
            key = (over[name], *(rows[name] for rows in self._rows.values()))
            if key not in made:
                made[key] = self._combine(name, key)
            return made[key]

        tensors = [tensor for tensor in self._plan.child.tensors if tensor.name in over]
        rules = [
            self._rule(where, row, base) for where, row in cover(tensors, lambda t: row_of(t.name))
        ]
        uses_base = any(get_method(rule.method).uses_base != "never" for rule in rules)
        return Recipe(
            self.parents,
            tuple(rules),
            base if uses_base else None,
            recipe.seed,
            dtype=recipe.dtype,
            shard_bytes=recipe.shard_bytes,
            experts=self._experts,
        )

    def shares(self, recipe: Recipe) -> dict[str, dict[str, float]]:
        """Component -> child -> how much of what the parents give comes by way of it, by weights.

        So that these shares times the parents' shares in each child are those in the composed child.
        """
        over = self._rows_of("the recipe over them", recipe, self._over)
        totals: dict[str, dict[str, float]] = {}
        elements: dict[str, int] = {}
        for name, factored in over.items():
            tensor = self._plan.child.by_name[name]
            total = totals.setdefault(tensor.component, dict.fromkeys(self._rows, 0.0))
            elements[tensor.component] = elements.get(tensor.component, 0) + tensor.elements
            rows = _rows(factored)
            inner = {child: _rows(of[name], len(rows)) for child, of in self._rows.items()}
            for number, row in enumerate(rows):
                given = {
                    child: abs(factor) * sum(abs(n) for p, n in inner[child][number] if p != BASE)
                    for child, factor in row
                    if child != BASE
                }
                for child, part in given.items():
                    share = part / (sum(given.values()) or 1.0)
                    total[child] += tensor.elements / len(rows) * share
        return {
            component: {child: part / max(elements[component], 1) for child, part in total.items()}
            for component, total in totals.items()
        }

    def _common_base(self, recipe: Recipe) -> ParentReference | None:
        bases = self._bases | ({recipe.base} if recipe.base else set())
        if len({base.fingerprint for base in bases if base}) > 1:
            raise BadInputError(
                "the recipe and its children take differences to different bases, so they do not "
                "compose: name one common ancestor"
            )
        return next(iter(bases), None)

    def _rows_of(self, where: str, recipe: Recipe, plan: Plan) -> dict[str, Factored]:
        """Tensor -> factors of the recipe's parents and of its base."""
        known: dict[int, Factored] = {}
        rows = {}
        assigned = plan.assign(recipe)  # held, so that ids stay what they are
        for name, way in assigned.items():
            if id(way) not in known:
                known[id(way)] = (
                    ByExpert(tuple(tuple(_factors(where, row).items()) for row in way.rows))
                    if way.rows
                    else tuple(_factors(where, way).items())
                )
            rows[name] = known[id(way)]
        return rows

    def _combine(self, name: str, key: tuple[Factored, ...]) -> Factored:
        """The factors of a tensor of the child, from those over the children and those of each child."""
        plain = [factored for factored in key if not isinstance(factored, ByExpert)]
        if not plain:
            return AS_ITS_EXPERTS
        if len(plain) < len(key):
            raise BadInputError(
                f"tensor {name!r}: is merged as its experts are in some of the children, or over them, and "
                "otherwise in others: these do not compose"
            )
        return self._multiply(plain[0], dict(zip(self._rows, plain[1:], strict=True)))

    def _multiply(self, over: Row, rows: Mapping[str, Row]) -> Row:
        terms: dict[str, list[float]] = {}
        for child, factor in over:
            for parent, inner in rows[child] if child != BASE else ((BASE, 1.0),):
                terms.setdefault(parent, []).append(factor * inner)
        order = [*(parent.name for parent in self.parents), BASE]
        # Exactly rounded sums, to so many decimals: the same recipe on every machine.
        summed = {name: round(math.fsum(terms.get(name, ())), DECIMALS) for name in order}
        return tuple((name, factor) for name, factor in summed.items() if factor)

    def _rule(self, where: Selector, row: Factored, base: ParentReference | None) -> Rule:
        if isinstance(row, ByExpert):
            return Rule(where, AS_EXPERTS.name)
        factors = dict(row)
        of_base = factors.pop(BASE, 0.0)
        if not of_base and list(factors.values()) == [1.0]:
            return Rule(where, "passthrough", {"source": next(iter(factors)), "scale": 1.0})
        # Only those that count are read; a mother may lack a tensor that she gives nothing to.
        seen = tuple(factors) or (self.parents[0].name,)
        named = () if len(seen) == len(self.parents) else seen
        weight = {name: factors.get(name, 0.0) for name in seen}
        if not of_base:
            return Rule(where, "linear", {"weight": weight, "normalize": 0.0}, parents=named)
        if abs(math.fsum([of_base, *factors.values()]) - 1.0) > AFFINE:
            assert base is not None
            raise BadInputError(
                f"the tensors of {where}: the factors of parents and base do not sum to 1, so they are no "
                "sum of task vectors: normalize the weights of `linear`, or do not scale `passthrough`"
            )
        parameters = {"weight": weight, "lambda": 1.0, "normalize": 0.0}
        return Rule(where, "task_arithmetic", parameters, parents=named)


def _rows(factored: Factored, count: int = 1) -> tuple[Row, ...]:
    """The factors of each row; of a tensor that is merged in one way so many times the same."""
    return factored.rows if isinstance(factored, ByExpert) else (factored,) * count


def _factors(where: str, way: Assignment) -> Factors:
    """What a tensor's parents, and its base, are multiplied by."""
    method = way.method
    if way.post is not None:
        check_composes(way.post, where)
    check_composes(method, where)
    assert method.coefficients is not None
    factors = method.coefficients(way.values)
    if method.uses_base == "always":
        return factors | {BASE: 1.0 - math.fsum(factors.values())}
    return factors
