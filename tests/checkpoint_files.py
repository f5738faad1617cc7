"""Hand-made checkpoints: written byte by byte or with the safetensors library, and read back with it."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch

from orchestrator.child_writer import ChildReport, ChildWriter
from orchestrator.pool.calls import LocalCalls
from workers.actors import MergeSpec, MergeWorker
from workers.checkpoints import (
    Checkpoint,
    WeightFile,
    open_checkpoint,
)
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT, Header, TensorEntry
from workers.merging import METHODS, MergeMethod, PostStep, Recipe, Rule, Selector
from workers.merging.executor import Merger
from workers.merging.sources import TORCH_DTYPES
from workers.storage.folder import FolderStore

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2}
"""Enough of a configuration for the checkpoints that are not loaded as models."""


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file: `header` as JSON (or as it is, if bytes), then `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: Any, start: Any, stop: Any) -> dict[str, Any]:
    """One value of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_checkpoint(
    folder: Path,
    *shards: dict[str, torch.Tensor],
    config: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
) -> Path:
    """A checkpoint of these tensors: one file, or several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    if len(shards) == 1:
        safetensors.torch.save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, as the safetensors library reads it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Its elements as a file holds them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_float64(tensor: torch.Tensor) -> numpy.ndarray:
    """Its values, exact, whatever floating point dtype it has."""
    return tensor.double().numpy()


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert tensor.shape == two[name].shape, name
        assert tensor_bytes(tensor) == tensor_bytes(two[name]), name


def described(
    shapes: dict[str, Sequence[int]], config: dict[str, Any], dtype: str | dict[str, str] = "BF16"
) -> Checkpoint:
    """A checkpoint of which only names and shapes are asked: there is no file behind it.

    `dtype` is that of all tensors, or of each by name.
    """
    entries, position = [], 0
    for name, shape in shapes.items():
        own = dtype if isinstance(dtype, str) else dtype[name]
        stop = position + int(numpy.prod(shape, dtype=object)) * BITS_PER_ELEMENT[own] // 8
        entries.append(TensorEntry(name, own, tuple(shape), position, stop))
        position = stop
    file = WeightFile("model.safetensors", position, Header(tuple(entries), b""))
    return Checkpoint(FolderStore("/nowhere"), config, (file,), ("config.json",))


class RemoteStore(FolderStore):
    """A folder that cannot be mapped: everything goes through reads, as from a bucket."""

    def local_path(self, key: str) -> Path | None:
        return None


def open_remote(folder: Path) -> Checkpoint:
    return replace(open_checkpoint(str(folder)), store=RemoteStore(folder))


def open_merger(parents: dict[str, Path], base: Path | None = None, **arguments: Any) -> Merger:
    opened = {name: open_checkpoint(str(path)) for name, path in parents.items()}
    return Merger(opened, open_checkpoint(str(base)) if base else None, **arguments)


def rule(method: str, where: Selector | None = None, **parameters: Any) -> Rule:
    return Rule(where or Selector(), method, parameters)


def recipe_for(merger: Merger, *rules: Rule, seed: int = 0) -> Recipe:
    return Recipe(merger.references, rules, merger.base_reference, seed)


def write_weights(
    merger: Merger, recipe: Recipe, store: FolderStore, threads: int = 1
) -> ChildReport:
    """Write the weight files of a child, by threads of this process."""
    writer = ChildWriter.create(recipe, merger.parents, merger.base, store)
    return writer.write(local_calls(merger, store, threads))


def local_calls(merger: Merger, store: FolderStore, threads: int = 1) -> LocalCalls:
    """Threads of this process that write into this very `store`."""
    worker = MergeWorker(MergeSpec({}, None, {}))
    worker.parents, worker.base = merger.parents, merger.base
    worker.store = lambda location: store
    return LocalCalls(worker, threads)


def write_child(merger: Merger, recipe: Recipe, target: Path, threads: int = 1) -> Path:
    """Merge and publish, as a campaign does."""
    store = FolderStore(target)
    writer = ChildWriter.create(recipe, merger.parents, merger.base, store)
    writer.write(local_calls(merger, store, threads))
    writer.publish({})
    return target


def realize(merger: Merger, recipe: Recipe, threads: int = 1) -> dict[str, torch.Tensor]:
    """The child's values, flat, by logical name, in the dtype that it is stored in."""
    views = {
        tensor.name: torch.full((tensor.elements,), 0x55).to(TORCH_DTYPES[tensor.dtype])
        for tensor in merger.start(recipe).plan.child.tensors
    }
    merger.realize(recipe, views, threads)
    return views


def run(merger: Merger, *rules: Rule, seed: int = 0, threads: int = 1) -> dict[str, torch.Tensor]:
    """`realize` a recipe of these rules."""
    return realize(merger, recipe_for(merger, *rules, seed=seed), threads)


def example_parameters(method: MergeMethod, parents: Sequence[str]) -> dict[str, Any]:
    """Parameters that any method must accept: another for each parent, its defaults where it has them."""
    given: dict[str, Any] = {}
    for parameter in method.parameters:
        if parameter.scope in ("flag", "choice"):
            assert parameter.default is not None, parameter.name
            continue
        if parameter.name == "steps":
            given["steps"] = 4  # of an iteration: what holds after a few holds after all
        low = parameter.low if math.isfinite(parameter.low) else 0.0
        high = parameter.high if math.isfinite(parameter.high) else low + 1.0
        if parameter.scope == "parent_name":
            given[parameter.name] = parents[-1]
        elif parameter.default is None and parameter.scope == "shared":
            given[parameter.name] = low + 0.3 * (high - low)
        elif parameter.default is None:
            given[parameter.name] = {
                name: low + (0.45 + 0.15 * number) * (high - low)
                for number, name in enumerate(parents)
            }
    return given


def example_merger(method: MergeMethod, folder: Path, **arguments: Any) -> Merger:
    """The method's parents, as many as it takes but three at most, of the folders `a`, `b`, `c` and
    `base` in `folder`."""
    most = min(3, method.parents[1] or 3)
    parents = {name: folder / name for name in "abc"[:most]}
    return open_merger(
        parents, folder / "base" if method.uses_base != "never" else None, **arguments
    )


def example_rule(method: MergeMethod, merger: Merger) -> Rule:
    """A rule that uses the method; a post-step after a sum of task vectors."""
    parameters = example_parameters(method, list(merger.parents))
    if method.post:
        return after("task_arithmetic", method.name, {"weight": 0.75}, parameters)
    return rule(method.name, **parameters)


def after(method: str, post: str, before: dict[str, Any], parameters: dict[str, Any]) -> Rule:
    """A rule with a post-step."""
    return replace(rule(method, **before), post=PostStep(post, parameters))


def digests_by_method(folder: Path, threads: int = 1) -> dict[str, dict[str, str]]:
    """Method -> tensor -> SHA-256 of its merged bytes, for every method whose bits are exact."""
    found = {}
    for name, method in METHODS.items():
        if method.exact and not method.post:
            merger = example_merger(method, folder)
            child = run(merger, example_rule(method, merger), seed=3, threads=threads)
            found[name] = {
                tensor: hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
                for tensor, values in child.items()
            }
    return found


def inexact_children(folder: Path) -> dict[str, torch.Tensor]:
    """`method/tensor` -> its merged values, for every method that leaves bits to the libraries."""
    found = {}
    for name, method in METHODS.items():
        if not method.exact:
            merger = example_merger(method, folder)
            child = run(merger, example_rule(method, merger), seed=3)
            found |= {f"{name}/{tensor}": values for tensor, values in child.items()}
    return found


def merge(
    target: Path,
    parents: dict[str, Path],
    rules: Iterable[Rule],
    base: Path | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The tensors of the child, read by the safetensors library."""
    merger = open_merger(parents, base)
    return read_tensors(write_child(merger, recipe_for(merger, *rules, seed=seed), target))


def files_of(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file, but for the model card and the store's own lock."""
    skipped = {"README.md", ".darwin-lock"}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in skipped}
