"""What the options of `darwin eval` ask for."""

from __future__ import annotations

from typing import Any

from orchestrator.config import EngineConfig, TaskConfig, engine_settings
from orchestrator.evaluating.evaluation import Wish
from orchestrator.evaluating.running import Machines
from orchestrator.inputs import open_tasks
from orchestrator.pool.placement import workers_asked_for
from workers.devices import is_device
from workers.errors import BadInputError
from workers.evaluation.protocols import Protocol
from workers.evaluation.protocols.retrying import ConfidenceRetry
from workers.evaluation.task import SPLITS

ENGINES = ("transformers", "vllm", "openai")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def wish_for(
    names: list[str],
    split: str,
    items: int | None,
    protocol: Protocol,
    engine: dict[str, Any],
    batch_size: int,
) -> Wish:
    """The wish, with its tasks opened. Raises `BadInputError` naming the option or the task."""
    if split not in SPLITS:
        raise BadInputError(f"--split: {split!r} is none of {', '.join(SPLITS)}")
    limits: dict[str, int | None] = {f"{split}_items": items}
    if isinstance(protocol, ConfidenceRetry) and protocol.dev_items:
        limits.setdefault("search_items", protocol.dev_items)
    tasks = open_tasks([TaskConfig(name=name, **limits) for name in names])
    known = [task.name for task in tasks]
    if len(set(known)) < len(known):
        raise BadInputError(f"--task: the names {known} are not all different")
    if isinstance(protocol, ConfidenceRetry):
        for task in tasks:
            there_are = len(task.items["search"])
            if there_are < protocol.dev_items and split != "search":
                raise BadInputError(
                    f"--dev-items: {protocol.dev_items}, but task {task.name} has {there_are} search items"
                )
    return Wish(tasks, split, protocol, engine, batch_size)


def settings_for(
    kind: str,
    device: str,
    dtype: str,
    threads: int,
    base_url: str | None,
    model: str | None,
    batch_size: int,
) -> dict[str, Any]:
    """What an engine is built from. Raises `BadInputError` naming the option."""
    if kind not in ENGINES:
        raise BadInputError(f"--engine: {kind!r} is none of {', '.join(ENGINES)}")
    if not is_device(device):
        raise BadInputError(f"--device: {device!r} is no device: cpu, cuda, cuda:1, ...")
    if dtype not in DTYPES:
        raise BadInputError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    if kind == "openai":
        if base_url is None or model is None:
            raise BadInputError("--engine openai: needs --base-url and --model")
        return {"kind": kind, "base_url": base_url, "model": model}
    if base_url is not None or model is not None:
        raise BadInputError("--base-url and --model: are for --engine openai")
    return engine_settings(
        EngineConfig(kind=kind, device=device, dtype=dtype, threads=threads, batch_size=batch_size)
    )


def machines_for(workers: int, threads: int, device: str, address: str | None) -> Machines:
    """Where the evaluation runs. Each worker has as many CPUs as threads, and a GPU if it is to use one."""
    pool = workers_asked_for(workers, threads)
    if pool is None and address is not None:
        raise BadInputError("--address: is for Ray workers: say how many with --workers")
    if pool is not None and device != "cpu":
        pool.gpus = 1
    return Machines(pool, address)


def parameters_from(texts: list[str]) -> dict[str, str]:
    """Parameters of a protocol from `KEY=VALUE` texts."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInputError(f"--parameter: {text!r} is not KEY=VALUE")
        found[key.strip()] = value.strip()
    return found
