"""Small relatives that route alike and not the same: the constructed case of the routers' tests.

`python -m tests.mixtures FOLDER` writes it, merges it with `router: harc`, and prints how the child routes.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
import yaml

from tests.families import LETTERS, build_model, write_tokenizer

SPREAD = 0.005
ROUTER_SCALE = 12.0
"""Times transformers' own: random routers of that spread would have every expert at about the same chance."""

ROUTER_SPREAD = 0.2


def write_mixtures(folder: Path, kind: str = "qwen3_moe", donors: int = 2) -> dict[str, Path]:
    """A base whose routers prefer experts, and donors that were moved away from it: every weight a
    little, the routers further."""
    found = {}
    for seed, name in enumerate(["base", *(f"donor{n}" for n in range(1, donors + 1))]):
        model = build_model(kind, 0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for called, weight in model.named_parameters():
                router = called.endswith("mlp.gate.weight")
                values = weight.float() * (ROUTER_SCALE if router else 1.0)
                if seed:
                    spread = ROUTER_SPREAD if router else SPREAD
                    values += torch.randn(weight.shape, generator=generator) * spread
                weight.copy_(values)
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
        (folder / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        found[name] = folder / name
    return found


def write_prompts(file: Path, letters: str, count: int, length: int = 40, seed: int = 0) -> Path:
    """A calibration set of random texts over some letters."""
    draw = random.Random(seed)
    lines = [
        {
            "id": str(number),
            "conditioned": "".join(draw.choices(letters, k=length)),
            "generic": "".join(draw.choices(LETTERS, k=length)),
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_recipe(folder: Path, kind: str = "qwen3_moe", **changes: object) -> Path:
    """The constructed case: two donors, each with prompts of its own half of the letters, and a recipe that
    adds what both have learnt to the base, whose routers HARC calibrates. `changes` replace keys of the
    recipe."""
    places = write_mixtures(folder, kind)
    sets = {
        name: [str(write_prompts(folder / f"{name}_prompts.jsonl", letters, 40, seed=seed))]
        for seed, (name, letters) in enumerate(
            (("donor1", LETTERS[:13]), ("donor2", LETTERS[13:26]))
        )
    }
    recipe = {
        "parents": [
            {"name": name, "path": str(place)}
            for name, place in (
                ("father", places["base"]),
                *((n, p) for n, p in places.items() if n != "base"),
            )
        ],
        "base": str(places["base"]),
        "rules": [{"method": "task_arithmetic", "parameters": {"weight": 0.7}}],
        "router": {"harc": {"sets": sets}},
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


if __name__ == "__main__":
    from orchestrator.single_merge import merge_recipe

    place = Path(sys.argv[1])
    merge_recipe(str(write_recipe(place)), str(place / "child"))
    card = (place / "child" / "README.md").read_text()
    print(card[card.index("## Routing") : card.index("## How")])
