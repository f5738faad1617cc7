"""mergekit's YAML files (version 0.1.5), translated into recipe files of our own.

The father is the model whose config, tokenizer and layout mergekit gives the child: its `base_model`,
also where that is not merged; without one mergekit takes any model, and we the first that is named.
A base that is the father stands among the parents, too, and the rules say whom their method sees:

* methods that merge differences to a base (ties, nuslerp, ...) do not see it, wherever it is listed;
* slerp and the like see the base first, then the other model;
* linear, karcher and passthrough know no base: a `base_model` among `models` is one more parent, and
  one that is not listed there becomes one (mergekit does that, too), but not in `slices`.

Rules for the layers of a slice come first, then one for embeddings, which is the first slice's, then one
for the final norm and the head, which is the last slice's. Differences: arithmetic is fp32 whatever
`dtype` says, which is the child's unless `out_dtype` is given; without either the child has the father's
dtype; vision towers, MTP layers and unknown tensors are the father's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from orchestrator.mergekit.config import MergekitConfiguration, Settings, Slice, Source
from orchestrator.mergekit.methods import REQUIRED, PeerParameter
from orchestrator.mergekit.models import model_location, output_dtype, short_names
from orchestrator.mergekit.settings import (
    Entry,
    Span,
    default_value,
    first_that_count,
    name_patterns,
    own_value,
    same_for_all,
)
from orchestrator.mergekit.tokens import chat_template, vocabulary_source
from workers.checkpoints import COMPONENTS, ArchitectureMap, Checkpoint
from workers.errors import BadInputError
from workers.merging import CARRIED, METHODS


@dataclass(frozen=True)
class Translation:
    """A recipe file's data, and what a recipe file cannot say."""

    data: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def is_mergekit(data: dict[Any, Any]) -> bool:
    """Whether a recipe file is in mergekit's spelling."""
    return "merge_method" in data or (
        "rules" not in data and any(key in data for key in ("models", "slices", "modules"))
    )


def from_mergekit(
    path: str, data: dict[Any, Any], opened: Callable[[str], Checkpoint]
) -> Translation:
    """Translate a file's data; models are `opened` where their layers must be counted or named.

    Raises `BadInputError` naming file and key for whatever is not supported or not understood.
    """
    try:
        return _Translator(MergekitConfiguration(data), opened).translation()
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error


class _Translator:
    def __init__(self, given: MergekitConfiguration, opened: Callable[[str], Checkpoint]) -> None:
        self.given = given
        self.opened = opened
        self.places = given.places
        self.father = self.places[0]
        self.names = short_names(self.places)

    def translation(self) -> Translation:
        models = dict(self.names)
        vocabulary = vocabulary_source(self.given.data)
        if vocabulary is not None and vocabulary not in ("union", "base"):
            location = model_location(vocabulary, "tokenizer_source")
            models = short_names([*self.places, location])
            vocabulary = models[location]
        elif vocabulary == "base":
            vocabulary = self.names[self.father]
        layers = self._stack()
        data = {
            "parents": [{"name": name, "path": place} for place, name in models.items()],
            "base": self._base(),
            "rules": self._rules(list(models.values())),
            "layers": layers,
            "dtype": output_dtype(self.given.data),
            "vocabulary": vocabulary,
            "allow_degenerate": True,
        }
        template = chat_template(
            self.given.data.get("chat_template"), [self.opened(p) for p in self.places]
            if self.given.data.get("chat_template") == "auto" else []
        )  # fmt: skip
        return Translation(
            {key: value for key, value in data.items() if value is not None},
            {} if template is None else {"chat_template.jinja": template.encode()},
            tuple(dict.fromkeys(self.given.warnings)),
        )

    @cached_property
    def father_map(self) -> ArchitectureMap:
        return ArchitectureMap(self.opened(self.father))

    def _base(self) -> str | None:
        """The location of the recipe's base, if the method merges differences to one."""
        if self.given.peer.base == "ignored" or METHODS[self.given.peer.own].uses_base == "never":
            return None
        bases = {part.base for part in self.given.slices}
        if len(bases) > 1:
            raise BadInputError(
                f"slices: {self.given.name} with different base_models is not supported: "
                f"{', '.join(sorted(map(str, bases)))}"
            )
        return bases.pop()

    def _spans(self) -> list[tuple[int, int]]:
        """The child's layers that each slice is, first and last."""
        spans, first = [], 0
        for part in self.given.slices:
            count = part.sources[0].count
            if count is None:
                count = self.father_map.layers
            spans.append((first, first + count - 1))
            first += count
        return spans

    def _stack(self) -> list[dict[str, list[int]]] | None:
        """The recipe's `layers`; None if each layer of the child is that of all its models."""
        if self.given.slices[0].sources[0].count is None:
            return None
        spans = self._spans()
        aligned = all(
            source.first == first
            for part, (first, _) in zip(self.given.slices, spans, strict=True)
            for source in part.sources
        )
        # A model with further layers must be told which of them are left out.
        counts = {ArchitectureMap.of(self.opened(place)).layers for place in self.places}
        if aligned and counts == {spans[-1][1] + 1}:
            return None
        stack = []
        for part in self.given.slices:
            base, seen = self._roles(part)
            named = [(self.names[source.model], source) for source in seen]
            if base is not None and base not in seen:
                named.append(("base", base))
            stack.append({name: [s.first, s.first + (s.count or 0) - 1] for name, s in named})
        return stack

    def _roles(self, part: Slice) -> tuple[Source | None, list[Source]]:
        """The base among a slice's sources, and the sources that the method sees as parents."""
        sources = list(part.sources)
        if self.given.peer.base == "ignored":
            return None, sources
        base = next((source for source in sources if source.model == part.base), None)
        others = [source for source in sources if source is not base]
        if not others and not self.given.peer.without_task_vectors:
            raise BadInputError(
                f"{part.where}: {self.given.name} needs models besides the base_model"
            )
        if base is not None and (not others or METHODS[self.given.peer.own].uses_base == "never"):
            return base, [base, *others]
        return base, others

    def _rules(self, parents: list[str]) -> list[dict[str, Any]]:
        first, last = self.given.slices[0], self.given.slices[-1]
        embedding = self._rule(first, Span(None), parents)
        rest = self._rule(last, Span(None), parents)
        if len(self.given.slices) == 1 and not first.varies_with_depth:
            return [rest]
        inside = []
        for part, span in zip(self.given.slices, self._spans(), strict=True):
            components = [component for component in COMPONENTS if component not in CARRIED]
            where = {"components": components, "layers": list(span)}
            inside.append((where, self._rule(part, Span(span), parents)))
        if all(rule == rest for rule in [embedding, *(rule for _, rule in inside)]):
            return [rest]
        rules = [{"where": where} | rule for where, rule in inside]
        if embedding != rest:
            rules.append({"where": {"components": ["embedding"]}} | embedding)
        return [*rules, rest]

    def _rule(self, part: Slice, span: Span, parents: list[str]) -> dict[str, Any]:
        """The rule for a slice's layers, or with them for what lies outside all layers."""
        method = METHODS[self.given.peer.own]
        base, sources = self._roles(part)
        if sources == [base]:
            source = self.names[sources[0].model]
            return {"method": "passthrough", "parameters": {"source": source}}
        names = [self.names[source.model] for source in sources]
        parameters = self._own_parameters(part, sources, span)
        if method.name == "passthrough":
            if len(names) > 1:
                raise BadInputError(
                    f"{part.where}: passthrough takes one model, not {len(names)} (a base_model is one)"
                )
            return {"method": method.name, "parameters": {"source": names[0]} | parameters}
        seen = {} if names == parents else {"parents": names}
        return {"method": method.name, "parameters": parameters} | seen

    def _own_parameters(self, part: Slice, sources: list[Source], span: Span) -> dict[str, Any]:
        found = {}
        for parameter in self.given.peer.parameters:
            if parameter.name == "nuslerp_row_wise":
                self._check_columns(part)
            if parameter.own is None:
                continue
            if parameter.scope == "shared":
                value = self._value([part.parameters], parameter, span)
            else:
                table = {
                    self.names[source.model]: self._value(
                        [source.parameters, part.parameters],
                        parameter,
                        replace(span, shifted=span.is_shifted(source.first)),
                    )
                    for source in sources
                }
                if all(value is None for value in table.values()):
                    value = None
                else:
                    given = {name: value for name, value in table.items() if value is not None}
                    value = same_for_all(given, list(given)) if len(given) == len(table) else given
            if value is not None:
                found[parameter.own] = value
        return found

    def _value(self, levels: list[Settings], parameter: PeerParameter, span: Span) -> Any:
        """A parameter's value here; None if ours is the same without being told."""
        entries = first_that_count([level.get(parameter.name) for level in levels])
        own = METHODS[self.given.peer.own].parameter(parameter.own or "")
        default = parameter.default
        given = bool(entries)
        if (not given or entries[-1].filter is not None) and default is not REQUIRED:
            entries = [*entries, Entry(None, default)]
        if not entries:
            return None
        filters = [entry.filter for entry in entries if entry.filter is not None]
        value = own_value(entries, parameter, span, self.father_map if filters else None)
        self.given.warnings += [
            f"parameter {parameter.name!r}: the filter {text!r} is in the name of no tensor of {self.father}"
            for text in filters
            if not name_patterns(text, self.father_map)
        ]
        same = default is not REQUIRED and value == default_value(parameter)
        if same and (own is None or (not given and own.default == value)):
            return None
        if own is None:
            raise BadInputError(
                f"parameters.{parameter.name}: {value!r} is not supported for {self.given.name}: "
                f"only {default_value(parameter)!r} is"
            )
        return None if value == [] else value

    def _check_columns(self, part: Slice) -> None:
        """Refuse what only mergekit's nuslerp does: vectors along the columns of a matrix."""

        def values(name: str, default: bool) -> list[Any]:
            entries = part.parameters.get(name) or [Entry(None, default)]
            return [
                v for e in entries for v in (e.value if isinstance(e.value, list) else [e.value])
            ]

        if any(values("nuslerp_row_wise", False)) and not all(values("nuslerp_flatten", True)):
            raise BadInputError(
                "parameters.nuslerp_row_wise: with nuslerp_flatten: false it stands for the columns "
                "of a matrix, which is not supported; without it each row is interpolated on its own"
            )
