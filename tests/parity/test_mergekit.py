"""`make parity`: the same file through mergekit 0.1.5 and `darwin merge`, compared tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from orchestrator.single_merge import merge_recipe
from tests.campaigns import run_darwin
from tests.families import build_model, write_tokenizer
from tests.parity.cases import CASES, REFUSED, Alike, Case, Near, Refused
from workers.errors import BadInputError

MERGEKIT = Path(__file__).parents[2] / ".venv-mergekit/bin"
RUNNER = Path(__file__).with_name("run_mergekit.py")
MODELS = 4
SPREAD = 0.01

FAMILIES = [
    pytest.param((kind, dtype), id=f"{kind}-{str(dtype).removeprefix('torch.')}")
    for kind in ("llama", "qwen3", "qwen3_moe", "gpt2")
    for dtype in (torch.float32, torch.bfloat16)
]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """Models of one kind in a folder, `m0` the base, and how mergekit ended in each case."""

    kind: str
    folder: Path
    dtype: torch.dtype
    outcomes: dict[str, str | None]


def write_models(folder: Path, kind: str, dtype: torch.dtype) -> None:
    """A base and relatives that went the same way by 4/5, with random weights that use all digits of
    `dtype`. (Without a common way, cosines between task vectors would be noise around zero.)"""
    base, common = 0, 1
    for number in range(MODELS):
        steps = {base: 1.0, common: 2.0, MODELS + number: 1.0} if number else {base: 1.0}
        model = build_model(kind, 0).float()
        with torch.no_grad():
            for seed, length in steps.items():
                generator = torch.Generator().manual_seed(seed)
                for weight in model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator) * SPREAD * length)
        model.to(dtype).save_pretrained(folder / f"m{number}")
        write_tokenizer(folder / f"m{number}")


def with_places(config: Any, folder: Path) -> Any:
    """The configuration with `m0`, `m1`, ... replaced by the models' folders."""
    if isinstance(config, dict):
        return {key: with_places(value, folder) for key, value in config.items()}
    if isinstance(config, list):
        return [with_places(value, folder) for value in config]
    is_model = isinstance(config, str) and re.fullmatch(r"m\d", config)
    return str(folder / config) if is_model else config


def write_config(case: Case | Refused, folder: Path) -> Path:
    file = folder / f"{case.name}.yml"
    file.write_text(yaml.safe_dump(with_places(yaml.safe_load(case.config), folder)))
    return file


def run_mergekit(merges: list[tuple[Path, Path]], order: Path) -> list[str | None]:
    """Each (configuration, output folder) in one process of mergekit's; what each ended with."""
    order.write_text(json.dumps([[str(config), str(out)] for config, out in merges]))
    finished = subprocess.run(
        [MERGEKIT / "python", RUNNER, order],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    outcomes: list[str | None] = json.loads(finished.stdout.splitlines()[-1])
    return outcomes


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    kind, dtype = request.param
    folder = tmp_path_factory.mktemp(kind)
    write_models(folder, kind, dtype)
    merges = [(write_config(case, folder), folder / f"{case.name}.mergekit") for case in CASES]
    outcomes = run_mergekit(merges, folder / "merges.json")
    return Family(kind, folder, dtype, dict(zip((c.name for c in CASES), outcomes, strict=True)))


def read_model(folder: Path) -> Tensors:
    """Every tensor, with fused experts taken apart."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            fused = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
            if fused is None:
                tensors[name] = tensor
                continue
            for number, expert in enumerate(tensor):
                parts = {"down_proj": expert}
                if fused[2] == "gate_up":
                    gate, up = expert.chunk(2)
                    parts = {"gate_proj": gate, "up_proj": up}
                for part, values in parts.items():
                    tensors[f"{fused[1]}.{number}.{part}.weight"] = values
    return tensors


def problems_of_elements(
    ours: Tensors, theirs: Tensors, models: list[Tensors], near: Near
) -> list[str]:
    """What is wrong with a child, tensor by tensor and over all."""
    problems = []
    squares = changes = 0.0
    for name, expected in theirs.items():
        inputs = [model[name] for model in models if name in model]
        largest = torch.stack([tensor.double().abs() for tensor in [expected, *inputs]]).amax(0)
        unit = torch.finfo(expected.dtype).eps * 2 ** largest.clamp(min=1e-30).log2().floor()
        apart = ours[name].double() - expected.double()
        differs = apart.abs() > near.ulps * unit
        count, allowed = (
            int(differs.sum()),
            2 + int(near.share * apart.numel()) if near.share else 0,
        )
        if count > allowed:
            problems.append(
                f"{name}: {count} of {apart.numel()} elements differ ({allowed} may), the largest by "
                f"{float((apart.abs() / unit).max()):.3g} ulps"
            )
        squares += float((apart * differs).square().sum())
        changes += float((expected.double() - (inputs or [0.0])[0]).square().sum())
    rms = (squares / changes) ** 0.5 if squares else 0.0
    if rms > near.rms:
        problems.append(f"what differs has {rms:.2g} of the rms of the change ({near.rms} may)")
    return problems


def moments(child: Tensors, models: list[Tensors], weights: list[float]) -> dict[str, float]:
    """Averages over all tensors of the change from the base (see `Alike`)."""
    kept, slope, changed, whole = torch.zeros(4), 0.0, 0.0, 0.0
    base, *relatives = models
    for name, tensor in child.items():
        change = tensor.double() - base[name].double()
        full = sum(
            w * (m[name].double() - base[name].double())
            for w, m in zip(weights, relatives, strict=False)
        )
        assert isinstance(full, torch.Tensor)
        rank = full.abs().argsort(-1).argsort(-1)
        for quarter in range(4):
            inside = rank * 4 // full.shape[-1] == quarter
            kept[quarter] += (change != 0)[inside].sum()
        slope += float((change * full).sum())
        changed += float(change.square().sum())
        whole += float(full.square().sum())
    elements = sum(tensor.numel() for tensor in child.values())
    shares = {f"kept {n}": float(k) * 4 / elements for n, k in enumerate(kept)}
    return shares | {"slope": slope / whole, "norm": (changed / whole) ** 0.5}


def problems_of_averages(
    ours: Tensors, theirs: Tensors, models: list[Tensors], case: Case, alike: Alike
) -> list[str]:
    weights = [m["parameters"]["weight"] for m in yaml.safe_load(case.config)["models"]]
    one, two = (moments(child, models, weights) for child in (ours, theirs))
    return [
        f"{name}: {one[name]:.3f} and {two[name]:.3f}"
        for name in one
        if abs(one[name] - two[name]) > getattr(alike, name.split()[0])
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_child_is_mergekits(family: Family, case: Case, tmp_path: Path) -> None:
    near = case.fp32 if family.dtype == torch.float32 else case.bf16
    if near is None:
        pytest.skip(case.difference)
    merge_recipe(str(family.folder / f"{case.name}.yml"), str(tmp_path / "child"))
    if family.kind in case.fails_for:
        assert family.outcomes[case.name] is not None, "it works now: compare"
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "child")
        return
    assert family.outcomes[case.name] is None
    ours = read_model(tmp_path / "child")
    theirs = read_model(family.folder / f"{case.name}.mergekit")
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }
    models = [read_model(family.folder / f"m{number}") for number in range(MODELS)]
    compared = {n: t for n, t in theirs.items() if not (case.whole and ".experts." in n)}
    if isinstance(near, Near):
        problems = problems_of_elements(ours, compared, models, near)
    else:
        problems = problems_of_averages(
            {n: ours[n] for n in compared}, compared, models, case, near
        )
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_models(folder, "llama", torch.float32)
    return folder


def test_both_commands_take_the_same_file(small_models: Path, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "linear")
    config = write_config(case, small_models)
    command = [MERGEKIT / "mergekit-yaml", config, tmp_path / "theirs", "--quiet"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    run_darwin("merge", str(config), str(tmp_path / "ours"))
    ours, theirs = read_model(tmp_path / "ours"), read_model(tmp_path / "theirs")
    models = [read_model(small_models / f"m{number}") for number in range(MODELS)]
    assert ours.keys() == theirs.keys()
    assert not problems_of_elements(ours, theirs, models, Near(ulps=2))


@pytest.fixture(scope="module")
def accepted(small_models: Path) -> dict[str, str | None]:
    """How mergekit ended with the files that darwin refuses."""
    merges = [
        (write_config(refused, small_models), small_models / f"{refused.name}.mergekit")
        for refused in REFUSED
    ]
    outcomes = run_mergekit(merges, small_models / "merges.json")
    return dict(zip((refused.name for refused in REFUSED), outcomes, strict=True))


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_darwin_refuses_what_mergekit_takes(
    refused: Refused, small_models: Path, accepted: dict[str, str | None], tmp_path: Path
) -> None:
    assert accepted[refused.name] is None
    with pytest.raises(BadInputError, match=refused.message):
        merge_recipe(str(write_config(refused, small_models)), str(tmp_path / "child"))
