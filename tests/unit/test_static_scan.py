"""The static scan, against the definitions in plain float64."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch

from orchestrator.mri import scan as scan_module
from orchestrator.mri.importance import changed_by, distance_by, importance_by, static_importance
from orchestrator.mri.scan import find_scan, scan_key, scan_parents
from orchestrator.pool.calls import LocalCalls
from tests.checkpoint_files import CONFIG, open_remote, to_float64, write_checkpoint
from workers.actors import MergeSpec, MergeWorker
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.diagnostics import distribution, static
from workers.diagnostics.comparison import Comparison
from workers.diagnostics.static import StaticScan
from workers.storage.folder import FolderStore

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02).to(dtype)


def reference(values: numpy.ndarray) -> dict[str, float]:
    """The definitions, word by word, of finite float64 values."""
    values = values.reshape(-1)
    mean = values.mean()
    std = math.sqrt(((values - mean) ** 2).mean())
    edges = (numpy.arange(257) - 128) * (12 * std / 256)
    counts = [
        (values < edges[0]).sum(),
        *(((values >= low) & (values < high)).sum() for low, high in pairwise(edges)),
        (values >= edges[-1]).sum(),
    ]
    shares = [count / len(values) for count in counts if count]
    return {
        "entropy": -sum(share * math.log2(share) for share in shares) / math.log2(258),
        "mean": mean,
        "std": std,
        "rms": math.sqrt((values**2).mean()),
        "abs_max": abs(values).max(),
    }


def scan_tensors(
    parents: dict[str, Checkpoint], base: Checkpoint | None = None, processes: int = 1
) -> dict[str, dict[str, Any]]:
    return {row["tensor"]: row for row in scan_all(parents, base, processes)["static"]}


def scan_all(
    parents: dict[str, Checkpoint], base: Checkpoint | None = None, processes: int = 1
) -> dict[str, Any]:
    return scan_parents(parents, base, calls_of(parents, base, processes), None)


def calls_of(
    parents: dict[str, Checkpoint], base: Checkpoint | None = None, processes: int = 1
) -> LocalCalls:
    worker = MergeWorker(MergeSpec({}, None, {}))
    worker.parents, worker.base = parents, base
    return LocalCalls(worker, processes)


def opened(folder: Path, *tensors: dict[str, torch.Tensor], **more: Any) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(folder, *tensors, **more)))


# -- one tensor ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (129, 150), (400, 333)])
def test_statistics_are_those_of_the_definition(
    dtype: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Of few elements, of a 16-bit table, and of several chunks; off zero, with a long tail."""
    values = (random(*shape, dtype=torch.float64) * 50) ** 3 * 0.01 + 0.003
    tensor = values.to(DTYPES[dtype])
    found = scan_tensors({"father": opened(tmp_path / "a", {UP: tensor})})[
        "layers.0.mlp.up_proj.weight"
    ]
    of = found["of"]["father"]
    assert (of.pop("nan"), of.pop("inf")) == (0, 0)
    assert of == pytest.approx(reference(to_float64(tensor)), rel=1e-10, abs=1e-15)
    assert found | {"of": {}} == {
        "tensor": "layers.0.mlp.up_proj.weight",
        "component": "mlp",
        "layer": 0,
        "expert": None,
        "elements": tensor.numel(),
        "of": {},
        "between": {},
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_values_have_one_bit(dtype: str, tmp_path: Path) -> None:
    tensor = torch.tensor([1.0, -1.0]).repeat(500).to(DTYPES[dtype])
    of = scan_tensors({"father": opened(tmp_path / "a", {NORM: tensor})})["norm.weight"]["of"][
        "father"
    ]
    assert of["entropy"] == 1 / math.log2(258)
    assert (of["mean"], of["std"], of["rms"], of["abs_max"]) == (0.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e-3])
def test_a_constant_has_neither_spread_nor_entropy(
    dtype: str, value: float, tmp_path: Path
) -> None:
    tensor = torch.full((33_001, 3), value, dtype=DTYPES[dtype])
    of = scan_tensors({"father": opened(tmp_path / "a", {UP: tensor})})[
        "layers.0.mlp.up_proj.weight"
    ]
    found = of["of"]["father"]
    assert (found["std"], found["entropy"]) == (0.0, 0.0)
    assert found["mean"] == pytest.approx(float(tensor[0, 0]), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 50), (300, 300)])
def test_what_is_not_finite_is_counted_and_left_out(
    dtype: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    tensor = random(*shape, dtype=DTYPES[dtype])
    flat = tensor.view(-1)
    flat[[3, 500, 1999]] = math.nan
    flat[7], flat[8] = math.inf, -math.inf
    row = scan_tensors(
        {
            "father": opened(tmp_path / "a", {UP: tensor}),
            "mother": opened(tmp_path / "b", {UP: tensor}),
        }
    )["layers.0.mlp.up_proj.weight"]
    of = row["of"]["father"]
    assert (of.pop("nan"), of.pop("inf")) == (3, 2)
    finite = to_float64(flat[torch.isfinite(flat)])
    assert of == pytest.approx(reference(finite), rel=1e-10)
    assert row["between"]["father|mother"] == {
        "distance": None,
        "cosine": None,
        "changed": 3 / tensor.numel(),  # a NaN equals nothing
    }


def test_nothing_but_nan_has_no_statistics(tmp_path: Path) -> None:
    tensors = {UP: torch.full((5, 5), math.nan), NORM: torch.full((4,), math.inf).bfloat16()}
    found = scan_tensors({"father": opened(tmp_path / "a", tensors)})
    for name, counts in (("layers.0.mlp.up_proj.weight", (25, 0)), ("norm.weight", (0, 4))):
        of = found[name]["of"]["father"]
        assert (of.pop("nan"), of.pop("inf")) == counts
        assert set(of.values()) == {None}
    json.dumps(found, allow_nan=False)


# -- what went wrong elsewhere ---------------------------------------------------------------


def test_an_outlier_does_not_dominate_the_entropy(tmp_path: Path) -> None:
    """A histogram over the range of the data, as others have it, is ruined by one element."""
    calm = random(250, 400, dtype=torch.float32)
    wild = calm.clone()
    wild[17, 5] = 1.0  # fifty standard deviations

    def of_range(values: torch.Tensor) -> float:
        counts, _ = numpy.histogram(values.numpy(), bins=256)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * numpy.log2(shares)).sum())

    assert of_range(wild) < 0.75 * of_range(calm)
    parents = {
        name: opened(tmp_path / name, {UP: t}) for name, t in (("calm", calm), ("wild", wild))
    }
    of = scan_tensors(parents)["layers.0.mlp.up_proj.weight"]["of"]
    assert of["wild"]["entropy"] == pytest.approx(of["calm"]["entropy"], rel=0.01)


def test_size_is_no_importance(tmp_path: Path) -> None:
    """The L2 norm of sixteen times the elements is four times as large; their importance is the same."""
    small = random(60, 64, dtype=torch.float32)
    large = small.repeat(4, 4)
    rows = scan_tensors(
        {"father": opened(tmp_path / "a", {UP: small, UP.replace("0", "1"): large})}
    )
    one, two = (rows[f"layers.{layer}.mlp.up_proj.weight"]["of"]["father"] for layer in (0, 1))
    assert one["rms"] == pytest.approx(two["rms"], rel=1e-12)
    found = static_importance(rows.values(), ["father"])
    assert len({round(of["father"], 9) for of in found.values()}) == 1


def test_importance_of_numbers_worked_out_by_hand() -> None:
    def row(tensor: str, entropy: float, std: float, rms: float, elements: int) -> dict[str, Any]:
        of = {"entropy": entropy, "std": std, "rms": rms, "nan": 0, "inf": 0}
        return {"tensor": tensor, "component": "mlp", "elements": elements, "of": {"father": of}}

    rows = [
        row("small", 0.6, 1.0, 2.0, 10),
        row("usual", 0.9, 3.0, 4.0, 1000),
        row("huge", 0.0, 9.0, 64.0, 10),
    ]
    # Medians: std 3, rms 4, so that the cap of rms is at 16.
    found = static_importance(rows, ["father"])
    assert found["small"]["father"] == pytest.approx((0.6 + 1 / 4 + 2 / 16) / 3)
    assert found["usual"]["father"] == pytest.approx((0.9 + 3 / 6 + 4 / 16) / 3)
    assert found["huge"]["father"] == pytest.approx((0.0 + 9 / 12 + 1.0) / 3)
    rows[1]["of"]["father"]["nan"] = 1
    assert static_importance(rows, ["father"])["usual"] == {}
    weighted = importance_by(rows, ["father"], "component")["father"]["mlp",]
    without = static_importance(rows, ["father"])
    assert weighted == pytest.approx((without["small"]["father"] + without["huge"]["father"]) / 2)


def test_norms_around_one_have_no_entropy_and_those_around_zero_have(tmp_path: Path) -> None:
    """The same norm, as Llama stores it and as Gemma does: bins lie around 0, so entropies compare
    parents of one convention, never tensors of different ones."""
    gains = random(4096, dtype=torch.float32)
    found = {}
    for name, tensor in (("zero", gains), ("one", gains + 1)):
        rows = scan_tensors({"father": opened(tmp_path / name, {NORM: tensor})})
        found[name] = rows["norm.weight"]["of"]["father"]
    assert found["one"]["entropy"] == 0.0
    assert found["zero"]["entropy"] > 0.7
    assert found["one"]["std"] == pytest.approx(found["zero"]["std"], rel=1e-5)


# -- pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("f16", "f32"), ("f64", "bf16")])
def test_pairs_are_compared_as_numbers(dtypes: tuple[str, str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    base = random(200, 301, seed=1)
    father, mother = (
        torch.where(
            torch.rand(base.shape, generator=generator) < 0.4,
            base.double() + random(200, 301, seed=seed, dtype=torch.float64) / 8,
            base.double(),
        ).to(DTYPES[dtype])
        for seed, dtype in zip((2, 3), dtypes, strict=True)
    )
    row = scan_tensors(
        {
            "father": opened(tmp_path / "f", {UP: father}),
            "mother": opened(tmp_path / "m", {UP: mother}),
        },
        opened(tmp_path / "b", {UP: base}),
    )["layers.0.mlp.up_proj.weight"]
    values = {"father": father, "mother": mother, "base": base}
    assert list(row["of"]) == ["father", "mother", "base"]
    assert list(row["between"]) == ["father|mother", "base|father", "base|mother"]
    for pair, found in row["between"].items():
        one, two = (to_float64(values[name]).reshape(-1) for name in pair.split("|"))
        norms = numpy.linalg.norm(one) * numpy.linalg.norm(two)
        assert found["distance"] == pytest.approx(numpy.linalg.norm(one - two), rel=1e-12)
        assert found["cosine"] == pytest.approx(one @ two / norms, rel=1e-12)
        assert found["changed"] == (one != two).mean()


def test_equal_opposite_and_zero_tensors(tmp_path: Path) -> None:
    tensor = random(50, 40)
    parents = {
        name: opened(tmp_path / name, {UP: values})
        for name, values in (
            ("father", tensor),
            ("twin", tensor),
            ("opposite", -tensor),
            ("zero", torch.zeros_like(tensor)),
        )
    }
    between = scan_tensors(parents)["layers.0.mlp.up_proj.weight"]["between"]
    assert between["father|twin"] == {"distance": 0.0, "cosine": 1.0, "changed": 0.0}
    assert between["father|opposite"]["cosine"] == pytest.approx(-1.0, abs=1e-12)
    assert between["father|opposite"]["cosine"] >= -1.0
    assert between["father|zero"]["cosine"] is None
    norm = float(numpy.linalg.norm(to_float64(tensor)))
    assert between["father|zero"]["distance"] == pytest.approx(norm, rel=1e-12)


def test_a_cosine_is_never_beyond_one() -> None:
    sums = Comparison()
    sums.product, sums.changed = -math.nextafter(1.0, 2.0), 1
    assert sums.finish((1.0, 1.0))["cosine"] == -1.0


def test_places_sum_up_their_tensors(tmp_path: Path) -> None:
    """The distance of a component is that of all its weights in one vector."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    father = {name: random(20 + 30 * n, 8, seed=n) for n, name in enumerate(names)}
    base = {name: random(20 + 30 * n, 8, seed=n + 9) for n, name in enumerate(names)}
    base[names[1]][:25] = father[names[1]][:25]
    found = scan_all({"father": opened(tmp_path / "f", father)}, opened(tmp_path / "b", base))
    ones, twos = (
        numpy.concatenate([to_float64(tensors[name]).reshape(-1) for name in names])
        for tensors in (base, father)
    )
    wanted = numpy.linalg.norm(twos - ones) / numpy.linalg.norm(ones)
    distance = distance_by(found["static"], "base|father", "component")
    assert distance == {("mlp",): pytest.approx(wanted, rel=1e-12)}
    changed = changed_by(found["static"], "base|father", "component")
    assert changed == {("mlp",): pytest.approx((ones != twos).mean(), rel=1e-12)}


# -- layouts ---------------------------------------------------------------------------------


def test_fused_and_single_experts_pair(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts"
    gate, up = (random(3, 10, 12, seed=seed) for seed in (1, 2))
    fused = {f"{stem}.gate_up_proj": torch.cat([gate, up], dim=1)}
    single = {
        f"{stem}.{expert}.{name}.weight": tensor[expert].clone()
        for expert in range(3)
        for name, tensor in (("gate_proj", gate), ("up_proj", up))
    }
    config = {"model_type": "qwen3_5_moe", "num_hidden_layers": 1}
    father = opened(tmp_path / "fused", fused, config=config)
    mother = opened(tmp_path / "single", single, config=config)
    for parents in ({"father": father, "mother": mother}, {"father": mother, "mother": father}):
        rows = scan_tensors(parents)
        assert len(rows) == 6
        for expert in range(3):
            for name, tensor in (("gate_proj", gate), ("up_proj", up)):
                row = rows[f"layers.0.mlp.experts.{expert}.{name}.weight"]
                assert (row["component"], row["expert"]) == ("expert", expert)
                assert row["of"]["father"] == row["of"]["mother"]
                assert row["of"]["father"]["rms"] == pytest.approx(
                    reference(to_float64(tensor[expert]))["rms"], rel=1e-12
                )
                assert row["between"]["father|mother"]["changed"] == 0.0


def test_fp8_codes_and_adapters_are_scanned_as_what_they_stand_for(tmp_path: Path) -> None:
    plain = random(6, 8, dtype=torch.float32)
    codes = (plain * 400).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 2.0], [0.25, 1.0]])
    config = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    father = opened(tmp_path / "fp8", {UP: codes, f"{UP}_scale_inv": scales}, config=config)
    blocks = scales.double().repeat_interleave(4, 0).repeat_interleave(4, 1)[:6]
    values = (codes.double() * blocks).numpy()
    base = write_checkpoint(tmp_path / "base", {UP: plain.bfloat16()})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = random(2, 8, seed=4, dtype=torch.float32), random(6, 2, seed=5, dtype=torch.float32)
    stem = f"base_model.model.{UP.removesuffix('.weight')}"
    safetensors.torch.save_file(
        {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    mother = open_checkpoint(f"{base}+{adapter}")
    adapted = to_float64(plain.bfloat16()) + 3.0 * (b.double() @ a.double()).numpy()
    row = scan_tensors({"father": father, "mother": mother})["layers.0.mlp.up_proj.weight"]
    for name, wanted in (("father", values), ("mother", adapted)):
        found = row["of"][name]
        assert found["rms"] == pytest.approx(reference(wanted)["rms"], rel=1e-6)
        assert found["entropy"] == pytest.approx(reference(wanted)["entropy"], rel=1e-6)
    distance = numpy.linalg.norm(values - adapted)
    assert row["between"]["father|mother"]["distance"] == pytest.approx(distance, rel=1e-6)
    assert scan_all({"father": father})["left_out"] == {}


def test_what_cannot_be_paired_is_left_out(tmp_path: Path) -> None:
    table, lone = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
    down = "model.layers.0.mlp.down_proj.weight"
    ids = {"model.layers.0.self_attn.position_ids": torch.arange(5)}
    father = opened(
        tmp_path / "f",
        {UP: random(4, 4), table: random(9, 4), lone: random(4, 4), down: random(2, 8)} | ids,
    )
    mother = opened(
        tmp_path / "m",
        {UP: random(4, 4, seed=1), table: random(11, 4), NORM: random(4), down: random(8, 2)},
    )
    found = scan_all({"father": father, "mother": mother})
    rows = {row["tensor"]: row for row in found["static"]}
    assert found["left_out"] == {"father": list(ids), "mother": [NORM]}
    assert set(rows["layers.0.self_attn.q_proj.weight"]["of"]) == {"father"}
    assert rows["layers.0.self_attn.q_proj.weight"]["between"] == {}
    # Tables of different vocabularies have no elements in common places.
    assert set(rows["embed_tokens.weight"]["of"]) == {"father", "mother"}
    assert rows["embed_tokens.weight"]["between"] == {}
    assert set(rows["layers.0.mlp.up_proj.weight"]["between"]) == {"father|mother"}
    # As many elements, but others.
    assert set(rows["layers.0.mlp.down_proj.weight"]["of"]) == {"father", "mother"}
    assert rows["layers.0.mlp.down_proj.weight"]["between"] == {}


def test_an_empty_tensor_has_no_statistics(tmp_path: Path) -> None:
    rows = scan_tensors({"father": opened(tmp_path / "f", {UP: torch.zeros(0, 4)})})
    (row,) = rows.values()
    assert row["of"]["father"]["rms"] is None
    assert row["elements"] == 0


# -- who scans what, and how much at once ----------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Father, mother and base: tensors of several chunks, in two dtypes, and many small ones."""
    root = tmp_path_factory.mktemp("family")
    return {
        name: write_checkpoint(
            root / name,
            {UP: random(300, 500, seed=seed), NORM: random(77, seed=seed)}
            | {
                f"model.layers.{layer}.self_attn.q_proj.weight": random(
                    200, 401, seed=seed + layer, dtype=torch.float32
                )
                for layer in range(3)
            },
        )
        for seed, name in enumerate(("father", "mother", "base"))
    }


@pytest.fixture(scope="module")
def alone(family: dict[str, Path]) -> dict[str, Any]:
    return scan_all(*open_family(family))


def open_family(family: dict[str, Path]) -> tuple[dict[str, Checkpoint], Checkpoint]:
    found = {name: open_checkpoint(str(folder)) for name, folder in family.items()}
    base = found.pop("base")
    return found, base


CUTS = {
    "processes": ({}, 2),
    "short stretches": ({(static, "STRETCH_ELEMENTS"): 1 << 15}, 1),
    "odd stretches": ({(static, "STRETCH_ELEMENTS"): 3 << 15}, 2),
    "small counts": ({(distribution, "COUNT_CHUNK"): 1000}, 1),
    "tables": ({(distribution, "FEW_CODES"): 0}, 1),
    "small groups": ({(scan_module, "LEAST_GROUP_BYTES"): 1}, 2),
    "groups of two": ({(scan_module, "GROUP_TENSORS"): 2}, 2),
}


@pytest.mark.parametrize(("constants", "processes"), CUTS.values(), ids=CUTS)
def test_bits_do_not_depend_on_how_the_work_is_cut(
    constants: dict[tuple[Any, str], int],
    processes: int,
    family: dict[str, Path],
    alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for (module, name), value in constants.items():
        monkeypatch.setattr(module, name, value)
    assert scan_all(*open_family(family), processes) == alone


def test_bits_do_not_depend_on_where_the_parents_lie(
    family: dict[str, Path], alone: dict[str, Any]
) -> None:
    parents = {name: open_remote(family[name]) for name in ("father", "mother")}
    assert scan_all(parents, open_remote(family["base"])) == alone


def test_progress_tells_of_all_bytes(family: dict[str, Path]) -> None:
    parents, base = open_family(family)
    told: list[int] = []
    scan_parents(parents, base, calls_of(parents, base), None, notify=told.append)
    stored = sum(c.total_bytes for c in (*parents.values(), base))
    assert sum(told) == scan_module.scan_bytes(parents, base) == stored


def test_plain_weights_are_scanned_without_torch(family: dict[str, Path]) -> None:
    """Importing it takes longer than the scan of a gigabyte."""
    code = (
        "import sys; from orchestrator.cli import app; "
        f"app(['scan', {str(family['father'])!r}, '--out', {str(family['father'].parent / 'out')!r}], "
        "standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- kept scans ------------------------------------------------------------------------------


class NoCalls:
    """Nothing is to be scanned."""

    def group_bytes(self, total: int) -> int:
        raise AssertionError

    def each(self, method: str, arguments: Any) -> Any:
        raise AssertionError


def test_a_scan_is_made_once(family: dict[str, Path], tmp_path: Path) -> None:
    parents, base = open_family(family)
    store = FolderStore(tmp_path / "store")
    first = scan_parents(parents, base, calls_of(parents, base), store)
    again, _ = open_family(family)
    assert scan_parents(again, base, NoCalls(), store) == first
    assert find_scan({"father": parents["father"]}, base, store) is None
    assert find_scan(parents, None, store) is None
    swapped = {"father": parents["mother"], "mother": parents["father"]}
    assert find_scan(swapped, base, store) is None
    store.write(scan_key(parents, base), b"{ torn")
    assert scan_parents(parents, base, calls_of(parents, base), store) == first
    assert find_scan(parents, base, store) == first


def test_a_kept_scan_is_read_under_other_names(family: dict[str, Path], tmp_path: Path) -> None:
    """As a campaign calls its parents: here even by each other's names."""

    class Probe:
        @property
        def identity(self) -> dict[str, Any]:
            return {"prompts": "one"}

        def run(self, parents: Any, calls: Any) -> dict[str, Any]:
            rows = {
                name: {
                    "set": [
                        {"layer": 0, "component": "attention", "of": opened.fingerprint},
                        {
                            "layer": 0,
                            "component": "mlp",
                            "routing": {
                                "tokens": 3,
                                "overlap": {
                                    n: o.fingerprint for n, o in parents.items() if n != name
                                },
                            },
                        },
                    ]
                }
                for name, opened in parents.items()
            }
            return {"sets": {"set": {}}, "parents": rows}

    parents, base = open_family(family)
    father, mother = parents.values()
    store = FolderStore(tmp_path / "store")
    probe = Probe()
    scan_parents(parents, base, calls_of(parents, base), store, probe)
    for names in (("one", "two"), ("mother", "father")):
        called = dict(zip(names, (father, mother), strict=True))
        found = scan_parents(called, base, NoCalls(), store, probe)
        assert found == scan_parents(called, base, calls_of(called, base), None, probe)
        assert scan_parents(called, base, NoCalls(), store) == scan_all(called, base)


def test_a_probe_is_run_once_for_its_prompts(family: dict[str, Path], tmp_path: Path) -> None:
    class Probe:
        runs = 0

        def __init__(self, prompts: str) -> None:
            self.identity = {"prompts": prompts}

        def run(self, parents: Any, calls: Any) -> dict[str, Any]:
            Probe.runs += 1
            return {"sets": self.identity, "parents": {}}

    parents, base = open_family(family)
    store = FolderStore(tmp_path / "store")
    static_part = scan_parents(parents, base, calls_of(parents, base), store)
    probed = scan_parents(parents, base, NoCalls(), store, Probe("one"))
    assert probed == static_part | {"probe": {"sets": {"prompts": "one"}, "parents": {}}}
    assert scan_parents(parents, base, NoCalls(), store, Probe("one")) == probed
    assert Probe.runs == 1
    scan_parents(parents, base, NoCalls(), store, Probe("two"))
    assert Probe.runs == 2
    assert scan_parents(parents, base, NoCalls(), store) == static_part


def test_the_worker_scans_what_it_has_opened(
    family: dict[str, Path], alone: dict[str, Any]
) -> None:
    spec = MergeSpec(
        {name: str(family[name]) for name in ("father", "mother")}, str(family["base"]), {}
    )
    worker = MergeWorker(spec)
    worker.describe()
    names = [row["tensor"] for row in alone["static"]]
    assert worker.scan_tensors(names[::-1]) == alone["static"][::-1]
    assert StaticScan(worker.parents, worker.base).scan(names[0]) == alone["static"][0]
