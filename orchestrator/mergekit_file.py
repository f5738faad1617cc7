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

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from orchestrator.mergekit_methods import PEER_METHODS, REQUIRED, PeerMethod, PeerParameter
from orchestrator.mergekit_settings import (
    Entry,
    Span,
    default_value,
    first_that_count,
    is_gradient,
    own_value,
    parse_setting,
    same_for_all,
)
from orchestrator.mergekit_tokens import chat_template, vocabulary_source
from workers.checkpoints import COMPONENTS, ArchitectureMap, Checkpoint
from workers.errors import BadInputError
from workers.merging import CARRIED, METHODS

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Settings = dict[str, list[Entry]]


@dataclass(frozen=True)
class Translation:
    """A recipe file's data, and what a recipe file cannot say."""

    data: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A model in a slice: its location, its first layer and how many (None: all), its parameters."""

    model: str
    parameters: Settings
    first: int = 0
    count: int | None = None


@dataclass(frozen=True)
class _Slice:
    sources: tuple[_Source, ...]
    base: str | None
    parameters: Settings
    where: str

    @property
    def varies_with_depth(self) -> bool:
        settings = [self.parameters, *(source.parameters for source in self.sources)]
        return any(is_gradient(entries) for level in settings for entries in level.values())


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
        return _Translator(data, opened).translation()
    except BadInputError as error:
        message = str(error)
        raise BadInputError(
            message if message.startswith(f"{path}:") else f"{path}: {message}"
        ) from error


class _Translator:
    def __init__(self, data: dict[Any, Any], opened: Callable[[str], Checkpoint]) -> None:
        _check_keys(data, KEYS, "")
        name = data.get("merge_method")
        if not isinstance(name, str) or name not in PEER_METHODS:
            raise BadInputError(
                f"merge_method: {name!r} is none of {', '.join(sorted(PEER_METHODS))}"
            )
        self.peer: PeerMethod = PEER_METHODS[name]
        if self.peer.own not in METHODS:
            raise BadInputError(f"merge_method: {name!r} is not supported")
        self.name = name
        self.data = data
        self.opened = opened
        self.warnings: list[str] = []
        self.global_base = _model_or_none(data.get("base_model"), "base_model")
        self.parameters = self._settings(data.get("parameters"), "parameters", shared=True)
        self.slices = self._slices()
        self.places = self._places()
        self.names = _short_names(list(self.places))

    # -- what the file says ------------------------------------------------------------------

    def _slices(self) -> tuple[_Slice, ...]:
        """The slices; `models` are one slice of all layers."""
        models, slices = self.data.get("models"), self.data.get("slices")
        if bool(models) == bool(slices):
            raise BadInputError("there must be either models or slices, a list of one or more")
        if slices:
            return tuple(
                self._slice(part, f"slices.{n}") for n, part in enumerate(_list(slices, "slices"))
            )
        sources = []
        for number, part in enumerate(_list(models, "models")):
            where = f"models.{number}"
            table = _check_keys(part, ("model", "parameters"), where)
            sources.append(_Source(*self._model_and_settings(table, where, self.global_base)))
        base = self.global_base
        if base is not None and base not in [source.model for source in sources]:
            sources.append(_Source(base, {}))
        return (self._checked(_Slice(tuple(sources), base, self.parameters, "models")),)

    def _slice(self, data: Any, where: str) -> _Slice:
        table = _check_keys(data, ("sources", "base_model", "parameters", "residual_weight"), where)
        if table.get("residual_weight") is not None:
            raise BadInputError(f"{where}.residual_weight: is not supported (nor used by mergekit)")
        base = _model_or_none(table.get("base_model"), f"{where}.base_model") or self.global_base
        own = self._settings(table.get("parameters"), f"{where}.parameters", shared=True)
        parameters = {
            name: first_that_count([own.get(name), self.parameters.get(name)])
            for name in own | self.parameters
        }
        sources = []
        for number, part in enumerate(_list(table.get("sources"), f"{where}.sources")):
            place = f"{where}.sources.{number}"
            source = _check_keys(part, ("model", "layer_range", "parameters"), place)
            first, end = _layer_range(source.get("layer_range"), f"{place}.layer_range")
            model, settings = self._model_and_settings(source, place, base)
            sources.append(_Source(model, settings, first, end - first))
        if len({source.count for source in sources}) > 1:
            raise BadInputError(f"{where}.sources: the layer ranges must be of one length")
        return self._checked(_Slice(tuple(sources), base, parameters, where))

    def _checked(self, part: _Slice) -> _Slice:
        models = [source.model for source in part.sources]
        for model in models:
            if models.count(model) > 1:
                raise BadInputError(f"{part.where}: the model {model!r} is given twice")
        if self.peer.base == "required" and part.base is None:
            raise BadInputError(f"{part.where}: {self.name} needs a base_model")
        if self.peer.base != "ignored" and part.base is not None and part.base not in models:
            raise BadInputError(
                f"{part.where}: the base_model {part.base!r} must be one of the sources, with the "
                "layers that these are merged with"
            )
        return part

    def _model_and_settings(
        self, table: dict[Any, Any], where: str, base: str | None
    ) -> tuple[str, Settings]:
        model = _model(table.get("model"), f"{where}.model")
        settings = self._settings(table.get("parameters"), f"{where}.parameters", shared=False)
        if model == base and self.peer.base != "ignored" and settings:
            self.warnings.append(
                f"{where}.parameters: have no effect: {self.name} merges differences to this model"
                if METHODS[self.peer.own].uses_base != "never"
                else f"{where}.parameters: have no effect: this model is the base"
            )
            settings = {}
        return model, settings

    def _settings(self, data: Any, where: str, *, shared: bool) -> Settings:
        if data is not None and not isinstance(data, dict):
            raise BadInputError(f"{where}: {data!r} is not a table of parameters")
        settings = {}
        for name, value in (data or {}).items():
            parameter = self.peer.parameter(name) if isinstance(name, str) else None
            if parameter is None:
                known = ", ".join(p.name for p in self.peer.parameters) or "none"
                raise BadInputError(
                    f"{where}.{name}: is no parameter of {self.name}, and mergekit ignores it: "
                    f"remove it (those of {self.name}: {known})"
                )
            if parameter.scope == "shared" and not shared:
                raise BadInputError(
                    f"{where}.{name}: is one number for all models, and mergekit ignores it here: "
                    "give it under the file's or the slice's parameters"
                )
            settings[name] = parse_setting(value, parameter, f"{where}.{name}")
            if parameter.own is None and parameter.name in ("density", "rescale"):
                self.warnings.append(f"{where}.{name}: has no effect on {self.name}")
        return settings

    def _places(self) -> dict[str, None]:
        """The locations of all models, the father's first."""
        named = [source.model for part in self.slices for source in part.sources]
        return dict.fromkeys([*([self.global_base] if self.global_base else []), *named])

    # -- what becomes of it ------------------------------------------------------------------

    def translation(self) -> Translation:
        models = dict(self.names)
        vocabulary = vocabulary_source(self.data)
        if vocabulary is not None and vocabulary not in ("union", "base"):
            location = _model(vocabulary, "tokenizer_source")
            models = _short_names([*self.places, location])
            vocabulary = models[location]
        elif vocabulary == "base":
            vocabulary = self.names[self.father]
        layers = self._stack()
        data = {
            "parents": [{"name": name, "path": place} for place, name in models.items()],
            "base": self._base(),
            "rules": self._rules(list(models.values()), layers is not None),
            "layers": layers,
            "dtype": _dtype(self.data),
            "vocabulary": vocabulary,
            "allow_degenerate": True,
        }
        template = chat_template(
            self.data.get("chat_template"), [self.opened(p) for p in self.places]
            if self.data.get("chat_template") == "auto" else []
        )  # fmt: skip
        return Translation(
            {key: value for key, value in data.items() if value is not None},
            {} if template is None else {"chat_template.jinja": template.encode()},
            tuple(dict.fromkeys(self.warnings)),
        )

    @property
    def father(self) -> str:
        return next(iter(self.places))

    @cached_property
    def father_map(self) -> ArchitectureMap:
        return ArchitectureMap(self.opened(self.father))

    def _base(self) -> str | None:
        """The location of the recipe's base, if the method merges differences to one."""
        if self.peer.base == "ignored" or METHODS[self.peer.own].uses_base == "never":
            return None
        bases = {part.base for part in self.slices}
        if len(bases) > 1:
            raise BadInputError(
                f"slices: {self.name} with different base_models is not supported: "
                f"{', '.join(sorted(map(str, bases)))}"
            )
        return bases.pop()

    def _spans(self) -> list[tuple[int, int]]:
        """The child's layers that each slice is, first and last."""
        spans, first = [], 0
        for part in self.slices:
            count = part.sources[0].count
            if count is None:
                count = self.father_map.layers
            spans.append((first, first + count - 1))
            first += count
        return spans

    def _stack(self) -> list[dict[str, list[int]]] | None:
        """The recipe's `layers`; None if each layer of the child is that of all its models."""
        if self.slices[0].sources[0].count is None:
            return None
        spans = self._spans()
        aligned = all(
            source.first == first
            for part, (first, _) in zip(self.slices, spans, strict=True)
            for source in part.sources
        )
        if aligned and spans[-1][1] + 1 == self.father_map.layers:
            return None
        stack = []
        for part in self.slices:
            base, seen = self._roles(part)
            named = [(self.names[source.model], source) for source in seen]
            if base is not None and base not in seen:
                named.append(("base", base))
            stack.append({name: [s.first, s.first + (s.count or 0) - 1] for name, s in named})
        return stack

    def _roles(self, part: _Slice) -> tuple[_Source | None, list[_Source]]:
        """The base among a slice's sources, and the sources that the method sees as parents."""
        sources = list(part.sources)
        if self.peer.base == "ignored":
            return None, sources
        base = next((source for source in sources if source.model == part.base), None)
        others = [source for source in sources if source is not base]
        if not others and not self.peer.without_task_vectors:
            raise BadInputError(f"{part.where}: {self.name} needs models besides the base_model")
        if base is not None and (not others or METHODS[self.peer.own].uses_base == "never"):
            return base, [base, *others]
        return base, others

    def _rules(self, parents: list[str], stacked: bool) -> list[dict[str, Any]]:
        first, last = self.slices[0], self.slices[-1]
        embedding = self._rule(first, Span(None), parents, stacked)
        rest = self._rule(last, Span(None), parents, stacked)
        if len(self.slices) == 1 and not first.varies_with_depth:
            return [rest]
        inside = []
        for part, span in zip(self.slices, self._spans(), strict=True):
            components = [component for component in COMPONENTS if component not in CARRIED]
            where = {"components": components, "layers": list(span)}
            inside.append((where, self._rule(part, Span(span), parents, stacked)))
        if all(rule == rest for rule in [embedding, *(rule for _, rule in inside)]):
            return [rest]
        rules = [{"where": where} | rule for where, rule in inside]
        if embedding != rest:
            rules.append({"where": {"components": ["embedding"]}} | embedding)
        return [*rules, rest]

    def _rule(self, part: _Slice, span: Span, parents: list[str], stacked: bool) -> dict[str, Any]:
        """The rule for a slice's layers, or with them for what lies outside all layers."""
        method = METHODS[self.peer.own]
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
        if stacked:  # There only those of the slice are seen anyway.
            parents = [name for name in parents if name in names]
        seen = {} if names == parents else {"parents": names}
        return {"method": method.name, "parameters": parameters} | seen

    def _own_parameters(self, part: _Slice, sources: list[_Source], span: Span) -> dict[str, Any]:
        found = {}
        for parameter in self.peer.parameters:
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
        own = METHODS[self.peer.own].parameter(parameter.own or "")
        default = parameter.default
        given = bool(entries)
        if (not given or entries[-1].filter is not None) and default is not REQUIRED:
            entries = [*entries, Entry(None, default)]
        if not entries:
            return None
        named = any(entry.filter is not None for entry in entries)
        value = own_value(entries, parameter, span, self.father_map if named else None)
        same = default is not REQUIRED and value == default_value(parameter)
        if same and (own is None or (not given and own.default == value)):
            return None
        return None if value == [] else value

    def _check_columns(self, part: _Slice) -> None:
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


def _check_keys(data: Any, keys: tuple[str, ...], where: str) -> dict[Any, Any]:
    prefix = f"{where}." if where else ""
    if not isinstance(data, dict):
        raise BadInputError(f"{where}: {data!r} is not a table of {', '.join(keys)}")
    for key in data:
        if key not in keys:
            reason = "models of several modules are merged by rules of a recipe file instead"
            raise BadInputError(
                f"{prefix}{key}: is not supported: "
                f"{reason if key == 'modules' and not where else 'known are ' + ', '.join(keys)}"
            )
    return data


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise BadInputError(f"{where}: must be a list of one or more")
    return data


def _layer_range(data: Any, where: str) -> tuple[int, int]:
    good = isinstance(data, list) and len(data) == 2 and all(type(n) is int for n in data)
    if not good or not 0 <= data[0] < data[1]:
        raise BadInputError(f"{where}: {data!r} is not [first, end], the end not included")
    return data[0], data[1]


def _model_or_none(data: Any, where: str) -> str | None:
    return None if data is None else _model(data, where)


def _model(data: Any, where: str) -> str:
    """A location as we write it, of a text PATH[@REVISION][+ADAPTER[@REVISION]] or a table of these."""
    if isinstance(data, dict):
        keys = ("model", "lora", "override_architecture")
        if "path" in data:
            return _model({"model": data}, where)
        table = _check_keys(data, keys, where)
        if table.get("override_architecture") is not None:
            raise BadInputError(f"{where}.override_architecture: is not supported")
        parts = [_path(table.get("model"), f"{where}.model")]
        if table.get("lora") is not None:
            parts.append(_path(table["lora"], f"{where}.lora"))
        return "+".join(parts)
    if not isinstance(data, str) or not data or "\0" in data:
        raise BadInputError(f"{where}: {data!r} is not the place of a model")
    if data.count("+") > 1:
        raise BadInputError(f"{where}: {data!r}: there can be one adapter (MODEL+ADAPTER)")
    return "+".join(_path(part, where) for part in data.split("+"))


def _path(data: Any, where: str) -> str:
    """One side of a model's location; a revision is for ids of the Hugging Face Hub."""
    if isinstance(data, dict):
        table = _check_keys(data, ("path", "revision"), where)
        path, revision = table.get("path"), table.get("revision")
    else:
        path, at, revision = data.partition("@") if isinstance(data, str) else (data, "", None)
        revision = revision if at else None
    if not isinstance(path, str) or not path or not isinstance(revision, str | None):
        raise BadInputError(f"{where}: {data!r} is not the place of a model")
    if revision is None:
        return path
    if not revision or not HUB_ID.fullmatch(path) or os.path.exists(path):
        raise BadInputError(
            f"{where}: {data!r}: a revision is for a model on the Hugging Face Hub, ORG/NAME@REVISION"
        )
    return f"hf://{path}@{revision}"


def _dtype(data: dict[Any, Any]) -> str | None:
    found = None
    for key in ("dtype", "out_dtype"):
        value = data.get(key)
        if value is None:
            continue
        name = value.removeprefix("torch.") if isinstance(value, str) else None
        if name not in DTYPES:
            raise BadInputError(f"{key}: {value!r} is none of {', '.join(DTYPES)}")
        found = DTYPES[name]
    return found


def _short_names(places: list[str]) -> dict[str, str]:
    """Location -> a short name of its own, from the last parts of the path."""
    names: dict[str, str] = {}
    for place in places:
        parts = [
            re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.")
            for part in re.sub(r"@[^/+]*", "", place.partition("://")[2] or place)
            .replace("+", "/+")
            .split("/")
        ]
        parts = [part for part in parts if part] or ["model"]
        candidates = ["-".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        candidates += [f"{parts[-1]}-{n}" for n in range(2, len(places) + 3)]
        taken = (*names.values(), "base", "union", "child")
        names[place] = next(name for name in candidates if name not in taken)
    return names
