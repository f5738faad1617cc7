"""What mergekit itself makes of its files, tensor by tensor, beside what ours do (`make parity`)."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.mergekit.methods import PEER_METHODS
from orchestrator.recipe_file import load_recipe_file
from tests.families import write_family
from workers.checkpoints import ArchitectureMap
from workers.errors import BadInputError
from workers.merging import METHODS
from workers.merging.plan import Plan, form_of

MERGEKIT = Path(__file__).parents[2] / ".venv-mergekit/bin/python"
FILES = 150
LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [str(path) for path in write_family(root, "llama", parents=3)]


BOUNDS = {"density": (0.3, 0.7), "epsilon": (0.01, 0.2)}
"""Where both take any value of the others."""


def setting(draw: random.Random, name: str, kind: str) -> Any:
    """A scalar, a gradient, or a filter list."""

    def plain() -> Any:
        def one() -> Any:
            return (
                draw.random() < 0.5
                if kind == "flag"
                else round(draw.uniform(*BOUNDS.get(name, (0.1, 1))), 2)
            )

        return one() if draw.random() < 0.5 else [one() for _ in range(draw.randint(1, 5))]

    if draw.random() < 0.5:
        return plain()
    filters = ["self_attn", "mlp", "norm", "embed", "proj", "lm_head", "model.", "nothing"]
    entries = [
        {"filter": draw.choice(filters), "value": plain()} for _ in range(draw.randint(1, 3))
    ]
    return entries + ([{"value": plain()}] if draw.random() < 0.7 else [])


def configuration(draw: random.Random, models: list[str]) -> dict[str, Any]:
    method = draw.choice(sorted(name for name in PEER_METHODS if PEER_METHODS[name].own in METHODS))
    peer = PEER_METHODS[method]
    least = {"passthrough": 1, "slerp": 2, "nearswap": 2, "arcee_fusion": 2, "nuslerp": 2}.get(
        method
    )
    used = draw.sample(models, least or draw.randint(2, 3))
    base = draw.choice(used) if peer.base == "required" else None

    def parameters(scopes: tuple[str, ...], share: float) -> dict[str, Any]:
        return {
            p.name: setting(draw, p.name, p.kind)
            for p in peer.parameters
            if p.scope in scopes
            and p.own is not None
            and p.kind != "whole"
            and draw.random() < share
        }

    every, own = ("shared", "input", "task_vector"), ("input", "task_vector")

    def entry(model: str) -> dict[str, Any]:
        found = {} if model == base else parameters(own, 0.5)
        return {"model": model} | ({"parameters": found} if found else {})

    data: dict[str, Any] = {"merge_method": method, "parameters": parameters(every, 0.9)}
    if base is not None:
        data["base_model"] = base
    if draw.random() < 0.5:
        data["models"] = [
            entry(model) for model in used if model != base or least or draw.random() < 0.5
        ]
        return data
    data["slices"] = []
    for _ in range(draw.randint(1, 3)):
        count = draw.randint(1, LAYERS)
        sources = []
        for model in used:
            first = draw.randint(0, LAYERS - count)
            sources.append(entry(model) | {"layer_range": [first, first + count]})
        data["slices"].append({"sources": sources, "parameters": parameters(every, 0.3)})
    return data


def ours(file: str) -> dict[str, Any]:
    """The same facts about our reading of a file, by the names that mergekit has for them."""
    loaded = load_recipe_file(file)
    maps = {name: ArchitectureMap(parent) for name, parent in loaded.parents.items()}
    plan = Plan(maps, ArchitectureMap(loaded.base) if loaded.base else None, form_of(loaded.recipe))
    found = {}
    for name, way in plan.assign(loaded.recipe).items():
        tensor = plan.child.by_name[name]
        reads = {}
        for parent in (*way.parents, *(["base"] if way.uses_base(loaded.base is not None) else [])):
            source = plan.source(parent, tensor)
            assert source is not None
            place = loaded.parents.get(parent, loaded.base)
            assert place is not None
            reads[place.location] = source.stored
        places = {parent: loaded.parents[parent].location for parent in way.parents}
        found[tensor.stored] = (way, reads, places)
    return found


def test_every_tensor_gets_the_parameters_that_mergekit_gives_it(
    models: list[str], tmp_path: Path
) -> None:
    if not MERGEKIT.is_file():
        pytest.skip("mergekit is not installed: make parity")
    draw = random.Random(0)
    files = []
    for n in range(FILES):
        files.append(str(tmp_path / f"{n}.yml"))
        Path(files[-1]).write_text(yaml.safe_dump(configuration(draw, models), sort_keys=False))
    listing = tmp_path / "files.json"
    listing.write_text(json.dumps(files))
    reader = Path(__file__).with_name("read_parameters.py")
    done = subprocess.run(
        [MERGEKIT, reader, listing], capture_output=True, text=True, check=True, timeout=600
    )
    compared = 0
    for file, theirs in zip(files, json.loads(done.stdout.splitlines()[-1]), strict=True):
        if theirs is None:
            with pytest.raises(BadInputError):
                ours(file)
            continue
        own = ours(file)
        compared += 1
        assert own.keys() == theirs.keys(), file
        for tensor, wanted in theirs.items():
            compare(f"{file}: {tensor}", own[tensor], wanted)
    assert compared > FILES / 2


def compare(where: str, own: Any, wanted: dict[str, Any]) -> None:
    way, reads, places = own
    assert reads == {model: read["tensor"] for model, read in wanted["models"].items()}, where
    peer = next(peer for peer in PEER_METHODS.values() if peer.own == way.method.name)
    for parameter in peer.parameters:
        if parameter.own is None:
            continue
        value = way.values[parameter.own]
        if parameter.scope == "shared":
            theirs = wanted["shared"][parameter.name]
            if parameter.choices is not None:
                assert value == parameter.choices[int(theirs)], f"{where}: {parameter.name}"
            else:
                assert value == pytest.approx(float(theirs), rel=1e-12), (
                    f"{where}: {parameter.name}"
                )
            continue
        for parent, place in places.items():
            theirs = wanted["models"][place]["parameters"][parameter.name]
            one = value[parent] if isinstance(value, dict) else value
            theirs = 1.0 if theirs is None else theirs  # passthrough's scale
            assert one == pytest.approx(float(theirs), rel=1e-12), (
                f"{where}: {parameter.name} of {place}"
            )
