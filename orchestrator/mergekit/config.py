"""mergekit's configuration as it is written, read strictly and with its models' locations as ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.mergekit.methods import PEER_METHODS, PeerMethod
from orchestrator.mergekit.models import (
    check_keys,
    layer_range,
    model_location,
    model_or_none,
    nonempty_list,
)
from orchestrator.mergekit.settings import Entry, first_that_count, is_gradient, parse_setting
from workers.errors import BadInputError
from workers.merging import METHODS

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip

Settings = dict[str, list[Entry]]


@dataclass(frozen=True)
class Source:
    """A model in a slice: its location, its parameters, its first layer and how many (None: all)."""

    model: str
    parameters: Settings
    first: int = 0
    count: int | None = None


@dataclass(frozen=True)
class Slice:
    """Models whose layers are merged with one another, and what holds for all of them."""

    sources: tuple[Source, ...]
    base: str | None
    parameters: Settings
    where: str

    @property
    def varies_with_depth(self) -> bool:
        settings = [self.parameters, *(source.parameters for source in self.sources)]
        return any(is_gradient(entries) for level in settings for entries in level.values())


class MergekitConfiguration:
    """One file's `data`. Raises `BadInputError` naming the key for what is not known or not supported."""

    def __init__(self, data: dict[Any, Any]) -> None:
        check_keys(data, KEYS, "")
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
        self.warnings: list[str] = []
        self.global_base = model_or_none(data.get("base_model"), "base_model")
        self.parameters = self._settings(data.get("parameters"), "parameters", shared=True)
        self.slices = self._read_slices()

    def _read_slices(self) -> tuple[Slice, ...]:
        """The slices; `models` are one slice of all layers."""
        models, slices = self.data.get("models"), self.data.get("slices")
        if bool(models) == bool(slices):
            raise BadInputError("there must be either models or slices, a list of one or more")
        if slices:
            return tuple(
                self._slice(part, f"slices.{n}")
                for n, part in enumerate(nonempty_list(slices, "slices"))
            )
        sources = []
        for number, part in enumerate(nonempty_list(models, "models")):
            where = f"models.{number}"
            table = check_keys(part, ("model", "parameters"), where)
            sources.append(Source(*self._model_and_settings(table, where, self.global_base)))
        base = self.global_base
        if base is not None and base not in [source.model for source in sources]:
            sources.append(Source(base, {}))
        return (self._checked(Slice(tuple(sources), base, self.parameters, "models")),)

    def _slice(self, data: Any, where: str) -> Slice:
        table = check_keys(data, ("sources", "base_model", "parameters", "residual_weight"), where)
        if table.get("residual_weight") is not None:
            raise BadInputError(f"{where}.residual_weight: is not supported (nor used by mergekit)")
        base = model_or_none(table.get("base_model"), f"{where}.base_model") or self.global_base
        own = self._settings(table.get("parameters"), f"{where}.parameters", shared=True)
        parameters = {
            name: first_that_count([own.get(name), self.parameters.get(name)])
            for name in own | self.parameters
        }
        sources = []
        for number, part in enumerate(nonempty_list(table.get("sources"), f"{where}.sources")):
            place = f"{where}.sources.{number}"
            source = check_keys(part, ("model", "layer_range", "parameters"), place)
            first, end = layer_range(source.get("layer_range"), f"{place}.layer_range")
            model, settings = self._model_and_settings(source, place, base)
            sources.append(Source(model, settings, first, end - first))
        if len({source.count for source in sources}) > 1:
            raise BadInputError(f"{where}.sources: the layer ranges must be of one length")
        return self._checked(Slice(tuple(sources), base, parameters, where))

    def _checked(self, part: Slice) -> Slice:
        models = [source.model for source in part.sources]
        for model in models:
            if models.count(model) > 1:
                raise BadInputError(f"{part.where}: the model {model!r} is given twice")
        if self.peer.base == "required" and part.base is None:
            raise BadInputError(
                f"base_model: is missing: {self.name} merges differences to one"
                + (f" ({part.where})" if part.where != "models" else "")
            )
        if self.peer.base != "ignored" and part.base is not None and part.base not in models:
            raise BadInputError(
                f"{part.where}: the base_model {part.base!r} must be one of the sources, with the "
                "layers that these are merged with"
            )
        return part

    def _model_and_settings(
        self, table: dict[Any, Any], where: str, base: str | None
    ) -> tuple[str, Settings]:
        model = model_location(table.get("model"), f"{where}.model")
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

    @property
    def places(self) -> list[str]:
        """The locations of all models, the father's first."""
        named = [source.model for part in self.slices for source in part.sources]
        return list(dict.fromkeys([*([self.global_base] if self.global_base else []), *named]))
