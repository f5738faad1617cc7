"""What a campaign works on: parents, base and tasks, opened by their headers and checked together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config import (
    OPERATIONAL_KEYS,
    CampaignConfig,
    TaskConfig,
    config_to_dict,
    find_shipped,
)
from orchestrator.mri.probe import load_calibration_sets
from orchestrator.objectives import task_weights
from orchestrator.places import open_parent
from orchestrator.weight_meaning import contradictions, meaning_warnings
from workers.checkpoints import ArchitectureMap, Checkpoint
from workers.checkpoints.names import HEAD
from workers.checkpoints.tokens import has_tokens, read_tokens
from workers.diagnostics.calibration import CalibrationSet
from workers.errors import BadInputError
from workers.evaluation import load_task
from workers.evaluation.task import Task, check_disjoint
from workers.merging import METHODS, MergeMethod, ParentReference

SCORING = 3
"""Raised when Darwin asks or scores the same items otherwise, or merges the same genomes otherwise: what one
version began the other cannot end."""


@dataclass(frozen=True)
class Inputs:
    """Parents (the father first), base and tasks of a campaign."""

    parents: dict[str, Checkpoint]
    base: Checkpoint | None
    tasks: tuple[Task, ...]
    calibration: tuple[CalibrationSet, ...] = ()
    """The prompts of the scan's probe; empty if the campaign does not probe."""
    expert_prompts: tuple[CalibrationSet, ...] = ()
    """Those that experts are matched with; empty if they are not matched by outputs."""
    scarce: tuple[str, ...] = ()
    """Splits of tasks with fewer items than the campaign asks for, each in a sentence."""

    @property
    def father(self) -> Checkpoint:
        return next(iter(self.parents.values()))

    @cached_property
    def references(self) -> tuple[ParentReference, ...]:
        return tuple(ParentReference(name, p.fingerprint) for name, p in self.parents.items())

    @cached_property
    def base_reference(self) -> ParentReference | None:
        return ParentReference("base", self.base.fingerprint) if self.base else None

    @cached_property
    def maps(self) -> dict[str, ArchitectureMap]:
        """The parents' architecture maps, the father's first."""
        return {name: ArchitectureMap.of(parent) for name, parent in self.parents.items()}

    @cached_property
    def base_map(self) -> ArchitectureMap | None:
        return ArchitectureMap.of(self.base) if self.base else None

    @property
    def father_map(self) -> ArchitectureMap:
        return next(iter(self.maps.values()))

    @cached_property
    def unused(self) -> dict[str, list[str]]:
        """Parent -> its stored tensors that have no counterpart in the father, so are in no child."""
        known = self.father_map.by_name
        return {
            name: sorted({t.stored for t in parent.tensors if t.name not in known})
            for name, parent in self.maps.items()
        }

    @property
    def warnings(self) -> list[str]:
        """What the user should know of the configurations of parents and base, and of the tasks."""
        models = self.parents | ({"base": self.base} if self.base else {})
        return [*meaning_warnings(models), *self.scarce]

    @property
    def same_checkpoints(self) -> list[list[str]]:
        """Names of parents that are one checkpoint, given twice."""
        found: dict[str, list[str]] = {}
        for name, parent in self.parents.items():
            found.setdefault(parent.fingerprint, []).append(name)
        return [names for names in found.values() if len(names) > 1]

    def identity(self, config: CampaignConfig) -> dict[str, Any]:
        """What decides the campaign's result: the configuration with places replaced by contents."""
        data = config_to_dict(config)
        data["scoring"] = SCORING
        for key in OPERATIONAL_KEYS:
            *path, last = key.split(".")
            holder = data
            for part in path:
                holder = holder[part]
            del holder[last]
        if config.breeding.rounds == 1:
            del data["breeding"]  # without breeding nothing of it counts
        if config.racing.use == "none":
            del data["racing"]  # without racing nothing of it counts
        if config.engine.kind == "transformers":
            # Campaigns are recorded that are older than the choice.
            del data["engine"]["kind"], data["engine"]["vllm"]
        if config.experts.match == "none":
            del data["experts"]
        else:
            data["experts"]["sets"] = [
                {"name": prompts.name, "content": prompts.sha256} for prompts in self.expert_prompts
            ]
        data["parents"] = [
            {"name": reference.name, "content": reference.fingerprint}
            for reference in self.references
        ]
        data["base"] = self.base_reference.fingerprint if self.base_reference else None
        data["tasks"] = [{"name": task.name, "content": task.fingerprint} for task in self.tasks]
        if config.objective == "weighted":
            for task, weight in zip(data["tasks"], task_weights(config).values(), strict=True):
                task["weight"] = weight
        data["scan"]["sets"] = [
            {"name": prompts.name, "content": prompts.sha256} for prompts in self.calibration
        ]
        return data


def open_inputs(config: CampaignConfig) -> Inputs:
    """Open everything that the configuration names. Raises `BadInputError` for what does not fit."""
    parents = {parent.name: open_parent(parent.path) for parent in config.parents}
    base = open_parent(config.base) if config.base else None
    check_parents(parents | ({"base": base} if base else {}))
    _check_experts(config, parents[config.parents[0].name])
    method = METHODS.get(
        config.genome.method
    )  # one that is unknown is the genome space's to refuse
    problem = too_few_task_vectors(method, parents, base) if method else None
    if problem is not None and not config.genome.allow_degenerate:
        raise BadInputError(f"genome.method: {problem}, or set genome.allow_degenerate: true")
    tasks = open_tasks(config.tasks)
    calibration = load_calibration_sets(config.scan.sets) if config.scan.probe else ()
    by_outputs = config.experts.match == "outputs"
    prompts = load_calibration_sets(config.experts.sets) if by_outputs else ()
    scarce = tuple(_scarce_splits(config.tasks, tasks))
    return Inputs(parents, base, tasks, calibration, prompts, scarce)


def open_tasks(wanted: Sequence[TaskConfig]) -> tuple[Task, ...]:
    """The tasks with their items. Raises `BadInputError` if an item of one split is in another, too."""
    tasks = []
    for task in wanted:
        file = find_shipped("task", task.name)
        try:
            definition = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"{file}: not a text file ({error})") from error
        limits = {"search": task.search_items, "holdout": task.holdout_items}
        tasks.append(load_task(Path(task.name).stem, definition, limits))
    check_disjoint(tasks)
    return tuple(tasks)


def _scarce_splits(wanted: Sequence[TaskConfig], tasks: Sequence[Task]) -> Iterator[str]:
    """Of each split with fewer items than are wanted, that all it has are taken."""
    for asked, task in zip(wanted, tasks, strict=True):
        for split, limit in (("search", asked.search_items), ("holdout", asked.holdout_items)):
            count = len(task.items[split])
            if limit is not None and count < limit:
                yield (
                    f"task {task.name}: {split}_items is {limit}, but its {split} split has {count} items: "
                    "all of them are taken"
                )


def _check_experts(config: CampaignConfig, father: Checkpoint) -> None:
    """Raise `BadInputError` for what a dense model has no use of, before anything is started for it."""
    asked = {
        "experts.match": (config.experts.match != "none", "none"),
        "workers.gang": (config.workers.gang > 1, "1"),
    }
    for key, (is_asked, off) in asked.items():
        if is_asked and not ArchitectureMap.of(father).experts:
            raise BadInputError(
                f"{key}: {father.location} has no routed experts: set {key} to {off}"
            )


def absolute_places(inputs: Inputs) -> tuple[dict[str, str], str | None]:
    """Locations of parents and base as another process, started elsewhere, can open them."""
    parents = {name: parent.location for name, parent in inputs.parents.items()}
    return parents, inputs.base.location if inputs.base else None


def check_parents(parents: dict[str, Checkpoint], vocabulary: str | None = None) -> None:
    """Raise `BadInputError` unless all have the first one's reading of weights, and its tokens.

    `vocabulary`: what a recipe chooses; if it does, the tokens may differ. Shapes are compared where the
    parents are merged, tensor by tensor.
    """
    (first, father), *others = parents.items()
    for name, parent in others:
        for key, own, other in contradictions(father, parent):
            raise BadInputError(
                f"{name} ({parent.location}): config.json has {key} {other!r}, but {first} has "
                f"{own!r}: such weights cannot be mixed"
            )
        if _has_own_head(parent) and not _has_own_head(father):
            raise BadInputError(
                f"{name} ({parent.location}): has an lm_head of its own, which {first} ties to its "
                "embedding: choose a father that stores one"
            )
    if vocabulary is None:
        _check_one_vocabulary(parents)


def _check_one_vocabulary(parents: dict[str, Checkpoint]) -> None:
    """Raise `BadInputError` unless all have the same token at every id that they share."""
    (first, father), *others = parents.items()
    tokens = _tokens_by_id(father)
    for name, parent in others:
        for token_id, token in _tokens_by_id(parent).items():
            if tokens.get(token_id, token) != token:
                raise BadInputError(
                    f"{name} ({parent.location}): token {token_id} is {token!r}, but "
                    f"{tokens[token_id]!r} in {first}: rows of the embedding would be mixed with those "
                    "of other tokens. For a merge, set `vocabulary: union` in the recipe (or base, or "
                    "a parent's name); a campaign needs parents of one vocabulary"
                )


class Identified(Protocol):
    """A checkpoint, or what stands for one."""

    @property
    def fingerprint(self) -> str: ...


def too_few_task_vectors(
    method: MergeMethod, parents: Mapping[str, Identified], base: Identified | None
) -> str | None:
    """What is wrong if so many parents equal the base that the method is not what its name says.

    A parent with the base's fingerprint has no task vector: there is then nothing whose sign could be
    elected, or whose singular vectors could interfere, and the method is a plain scaling of what is left.
    """
    if base is None or not method.least_task_vectors:
        return None
    equal = [name for name, p in parents.items() if p.fingerprint == base.fingerprint]
    different = len(parents) - len(equal)
    if different >= method.least_task_vectors:
        return None
    found = f"{', '.join(equal)} {'is' if len(equal) == 1 else 'are'} the base" if equal else (
        "there are no other parents"
    )  # fmt: skip
    return (
        f"method {method.name} needs {method.least_task_vectors} parents that differ from the base, "
        f"but {different} of {len(parents)} does ({found}), so it has nothing to weigh against "
        "each other: name the parents' common ancestor as `base`, choose a method that adds task "
        "vectors up (task_arithmetic, dare_linear)"
    )


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether it stores a head that is not its embedding."""
    architecture = ArchitectureMap.of(checkpoint)
    return HEAD in architecture.by_name and not architecture.ties_head


def _tokens_by_id(checkpoint: Checkpoint) -> dict[int, str]:
    """The vocabulary of tokenizer.json; empty if there is none."""
    if not has_tokens(checkpoint):
        return {}
    return {token.id: token.content for token in read_tokens(checkpoint).entries}
