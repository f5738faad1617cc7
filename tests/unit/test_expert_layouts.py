"""Experts are transplanted whatever the layouts, and read by their own byte ranges alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_files import (
    RemoteStore,
    assert_same_bits,
    open_merger,
    read_tensors,
    realize,
    recipe_for,
    rule,
    run,
    write_child,
)
from tests.expert_parents import (
    EXPERTS,
    FP8_CONFIG,
    HIDDEN,
    INNER,
    Tensors,
    fp8_pack,
    inverse,
    random_experts,
    reordered,
    unfused,
    write_experts,
)
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.merging import Selector
from workers.merging.executor import Merger

PLANTED = {0: (3, 0, 5, 1, 4, 2), 1: (1, 2, 0, 3, 5, 4)}
WANTED = {layer: inverse(order) for layer, order in PLANTED.items()}
FATHER = random_experts(1)
DONOR = random_experts(2, FATHER, 0.1)
TRANSPLANTED = (1, 3)
"""First and last of the experts that come from the donor."""
RULES = (
    rule("passthrough", Selector(components=("expert",), experts=TRANSPLANTED), source="b"),
    rule("as_experts", Selector(components=("router",))),
)


def transplanted(father: Tensors, donor: Tensors) -> Tensors:
    """Fused, by plain indexing."""
    child = dict(father)
    first, last = TRANSPLANTED
    for name in father:
        if ".experts." in name or ".gate." in name:
            child[name] = father[name].clone()
            child[name][first : last + 1] = donor[name][first : last + 1]
    return child


@pytest.mark.parametrize("father_layout", ["fused", "single"])
@pytest.mark.parametrize("donor_layout", ["fused", "single", "fp8"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_transplant_between_layouts(
    father_layout: str, donor_layout: str, is_moved: bool, tmp_path: Path
) -> None:
    """The child has the father's layout; FP8 experts come as the values that they stand for."""
    layouts: dict[str, Callable[[Tensors], Tensors]] = {"fused": dict, "single": unfused}
    layout = layouts[father_layout]
    donor = reordered(DONOR, PLANTED) if is_moved else DONOR
    stored, values = layouts.get(donor_layout, unfused)(donor), donor
    config: dict[str, Any] = {}
    if donor_layout == "fp8":
        stored, singles = fp8_pack(stored)
        values, config = fused(singles), FP8_CONFIG
    folders = {
        "a": write_experts(tmp_path / "a", layout(FATHER)),
        "b": write_experts(tmp_path / "b", stored, **config),
    }
    merger = open_merger(folders)
    recipe = recipe_for(merger, *RULES)
    if is_moved:
        recipe = replace(recipe, experts={"b": WANTED})
        values = reordered(values, WANTED)
    child = read_tensors(write_child(merger, recipe, tmp_path / "child"))
    assert_same_bits(child, layout(transplanted(FATHER, values)))


def fused(singles: Tensors) -> Tensors:
    """What `unfused` was given."""
    found: Tensors = {name: value for name, value in singles.items() if ".experts." not in name}
    for layer in (0, 1):
        stem = f"model.layers.{layer}.mlp.experts"
        of = {
            role: torch.stack([singles[f"{stem}.{e}.{role}_proj.weight"] for e in range(EXPERTS)])
            for role in ("gate", "up", "down")
        }
        found[f"{stem}.gate_up_proj"] = torch.cat([of["gate"], of["up"]], dim=1)
        found[f"{stem}.down_proj"] = of["down"]
    return found


# Prediction heads


def with_heads(tensors: Tensors, seed: int) -> Tensors:
    """A model with a prediction layer of its own experts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
        "mtp.layers.0.mlp.gate.weight": (EXPERTS, HIDDEN),
        "mtp.layers.0.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
        "mtp.layers.0.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
    }
    heads = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {name: value.bfloat16() for name, value in heads.items()}


def heads_unfused(tensors: Tensors) -> Tensors:
    """As Qwen3.5's packs have it: single experts in the prediction head, fused ones in the trunk."""
    heads = {name: value for name, value in tensors.items() if name.startswith("mtp.")}
    return {name: value for name, value in tensors.items() if name not in heads} | unfused(heads)


@pytest.mark.parametrize("father_is_fused", [True, False])
def test_experts_of_prediction_heads(father_is_fused: bool, tmp_path: Path) -> None:
    """Carried from the father; taken from a donor of the other layout by a rule that names them."""
    father, donor = with_heads(FATHER, 5), with_heads(DONOR, 6)
    own, theirs = (dict, heads_unfused) if father_is_fused else (heads_unfused, dict)
    folders = {
        "a": write_experts(tmp_path / "a", own(father)),
        "b": write_experts(tmp_path / "b", theirs(donor)),
    }
    merger = open_merger(folders)
    carried = write_child(merger, recipe_for(merger, *RULES), tmp_path / "carried")
    assert_same_bits(read_tensors(carried), own(transplanted(father, donor) | head_of(father)))
    named = Selector(names=("mtp.layers.0.mlp.experts.[12].*",))
    recipe = recipe_for(merger, rule("passthrough", named, source="b"))
    child = read_tensors(write_child(merger, recipe, tmp_path / "child"))
    expected = dict(father)
    for name in father:
        if name.startswith("mtp.layers.0.mlp.experts."):
            expected[name] = father[name].clone()
            expected[name][1:3] = donor[name][1:3]
    assert_same_bits(child, own(expected))


def head_of(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith("mtp.")}


# What is read


class CountingStore(RemoteStore):
    """Keeps the byte ranges that are read from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.spans: list[tuple[int, int]] = []

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        self.spans.append((start, start + buffer.nbytes))
        super().read_into(key, start, buffer, version)


def counted(folder: Path) -> tuple[Checkpoint, CountingStore]:
    store = CountingStore(folder)
    return replace(open_checkpoint(str(folder)), store=store), store


def ranges(checkpoint: Checkpoint, name: str, experts: Iterable[int]) -> list[tuple[int, int]]:
    """Where rows of a fused tensor lie in the file."""
    entry = checkpoint.tensors[name]
    size = (entry.stop - entry.start) // entry.shape[0]
    return [(entry.start + e * size, entry.start + (e + 1) * size) for e in experts]


@pytest.mark.parametrize("is_moved", [False, True])
def test_only_the_needed_experts_are_read(is_moved: bool, tmp_path: Path) -> None:
    """Of the donor its transplanted experts and its routers; of the father his routers and what he keeps."""
    donor = reordered(DONOR, PLANTED) if is_moved else DONOR
    folders = {
        "a": write_experts(tmp_path / "a", FATHER),
        "b": write_experts(tmp_path / "b", donor),
    }
    opened = {name: counted(folder) for name, folder in folders.items()}
    merger = Merger({name: checkpoint for name, (checkpoint, _) in opened.items()})
    recipe = recipe_for(merger, *RULES)
    if is_moved:
        recipe = replace(recipe, experts={"b": WANTED})
    for _, store in opened.values():
        store.spans.clear()  # opening reads headers, and fingerprints everything
    child = realize(merger, recipe)
    assert len(child) == len(merger.plan.child.tensors)
    places = range(TRANSPLANTED[0], TRANSPLANTED[1] + 1)
    others = [place for place in range(EXPERTS) if place not in places]
    expected: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    for name in FATHER:
        layer = 1 if ".layers.1." in name else 0
        order = WANTED[layer] if is_moved else tuple(range(EXPERTS))
        if ".experts." in name:
            expected["a"] += ranges(opened["a"][0], name, others)
            expected["b"] += ranges(opened["b"][0], name, (order[place] for place in places))
        elif ".gate." in name:
            for parent in "ab":
                expected[parent] += ranges(opened[parent][0], name, range(EXPERTS))
        else:
            expected["a"] += ranges(opened["a"][0], name, range(FATHER[name].shape[0]))
    for parent, (_, store) in opened.items():
        assert joined(store.spans) == joined(expected[parent]), parent
        assert sum(stop - start for start, stop in store.spans) == sum(
            stop - start for start, stop in expected[parent]
        ), "nothing twice"


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as the fewest ranges."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def test_a_parent_of_routers_alone_gives_them(tmp_path: Path) -> None:
    """As a calibration writes them: rules take from it by name, and nothing else is asked of it."""
    routers = {name: -value for name, value in FATHER.items() if name.endswith(".gate.weight")}
    folders = {
        "a": write_experts(tmp_path / "a", FATHER),
        "b": write_experts(tmp_path / "b", DONOR),
        "routers": write_experts(tmp_path / "routers", routers),
    }
    merger = open_merger(folders)
    named = Selector(components=("router",), names=("*.gate.weight",))
    child = run(merger, rule("passthrough", named, source="routers"), RULES[0])
    for name, value in routers.items():
        assert torch.equal(child[name.removeprefix("model.")], value.reshape(-1))
