"""Which values a campaign's configuration may have, and which of them go together."""

from __future__ import annotations

import math
import re
from pathlib import Path

from orchestrator.config import (
    GATES,
    MATCHINGS,
    OWN_VLLM_ARGUMENTS,
    CampaignConfig,
    config_to_dict,
)
from orchestrator.config_secrets import check_no_secrets
from orchestrator.jobs.driver_config import check_driver
from orchestrator.objectives import check_objective
from orchestrator.racing_config import check_racing
from orchestrator.watching_config import check_watching
from orchestrator.workers_config import check_workers
from workers.devices import is_device
from workers.errors import BadInputError


def check_values(config: CampaignConfig, file: str) -> None:
    """Raise `BadInputError`, naming file and key, for a value that cannot be, or cannot be with the rest."""

    def refuse(key: str, problem: str) -> None:
        raise BadInputError(f"{file}: {key}: {problem}")

    check_no_secrets(config_to_dict(config), refuse)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        refuse("name", f"{config.name!r} must be letters, digits, '.', '_' and '-'")
    names = [parent.name for parent in config.parents]
    if len(names) < 2:
        refuse("parents", "a merge needs two or more")
    if len(set(names)) < len(names):
        refuse("parents", f"the names {names} are not all different")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in ("base", "child"):
            refuse("parents", f"the name {name!r} must be letters, digits, '_' and '-', and "
                              "neither base nor child")  # fmt: skip
    if not config.tasks:
        refuse("tasks", "a campaign needs one or more")
    tasks = [Path(task.name).stem for task in config.tasks]
    if len(set(tasks)) < len(tasks):
        refuse("tasks", f"the names {tasks} are not all different")
    check_objective(config, refuse)
    check_watching(config.cost, config.log, refuse)
    whole_numbers = {
        "genome.blocks": config.genome.blocks,
        "search.evaluations": config.search.evaluations,
        "search.population": config.search.population,
        "breeding.rounds": config.breeding.rounds,
        "engine.threads": config.engine.threads,
        "engine.batch_size": config.engine.batch_size,
        "health.prompts": config.health.prompts,
        "health.new_tokens": config.health.new_tokens,
    }
    for number, task in enumerate(config.tasks):
        whole_numbers[f"tasks.{number}.search_items"] = task.search_items
        whole_numbers[f"tasks.{number}.holdout_items"] = task.holdout_items
    for key, value in whole_numbers.items():
        if value is not None and value < 1:
            refuse(key, f"{value} must be 1 or more")
    if config.scan.sets and not config.scan.probe:
        refuse("scan.sets", "is for a probe: set scan.probe to true")
    if not 0 <= config.scan.alpha <= 1:
        refuse("scan.alpha", f"{config.scan.alpha} is not between 0 and 1")
    if config.experts.match not in MATCHINGS:
        refuse("experts.match", f"{config.experts.match!r} is none of {', '.join(MATCHINGS)}")
    if config.experts.sets and config.experts.match != "outputs":
        refuse("experts.sets", "are the prompts of experts.match: outputs")
    if config.breeding.survivors < 2:
        refuse("breeding.survivors", f"{config.breeding.survivors} must be 2 or more")
    rounds = config.breeding.rounds
    if rounds > 1 and rounds * config.breeding.survivors > config.search.evaluations:
        refuse("breeding.rounds", f"{rounds} rounds of so many evaluations cannot have "
                                  f"{config.breeding.survivors} survivors each")  # fmt: skip
    check_racing(config.racing, config.objective, refuse)
    check_driver(config.driver, refuse)
    if not 0 < config.search.step < math.inf:
        refuse("search.step", f"{config.search.step} must be a number above 0")
    check_workers(config.workers, refuse)
    for key in ("repetition", "endings", "difference", "function_loss"):
        if not 0 <= (value := getattr(config.health, key)) <= 1:
            refuse(f"health.{key}", f"{value} must be a share from 0 to 1")
    for key in ("perplexity", "interference"):
        if not 0 < (value := getattr(config.health, key)) < math.inf:
            refuse(f"health.{key}", f"{value} must be a number above 0")
    for name in config.health.allow:
        if name not in GATES:
            refuse("health.allow", f"{name!r} is none of {', '.join(GATES)}")
    if config.seed < 0:
        refuse("seed", f"{config.seed} must not be negative")
    if config.engine.canary < 0:
        refuse("engine.canary", f"{config.engine.canary} must be 0 or more")
    if config.engine.kind not in ("transformers", "vllm"):
        refuse("engine.kind", f"{config.engine.kind!r} is neither transformers nor vllm")
    if config.engine.vllm and config.engine.kind != "vllm":
        refuse("engine.vllm", "is for vLLM: set engine.kind to vllm")
    if config.engine.kind == "vllm" and config.workers.gang > 1:
        refuse("workers.gang", "is for transformers; vLLM divides a model by engine.vllm")
    for key in OWN_VLLM_ARGUMENTS:
        if key in config.engine.vllm:
            refuse(f"engine.vllm.{key}", "is Darwin's own to set")
    if not is_device(config.engine.device):
        refuse("engine.device", f"{config.engine.device!r} is neither cpu nor cuda")
    if config.engine.dtype not in ("auto", "float32", "bfloat16", "float16"):
        refuse(
            "engine.dtype", f"{config.engine.dtype!r} is none of auto, float32, bfloat16, float16"
        )
