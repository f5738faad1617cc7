"""`darwin align`: a mother of another architecture becomes a parent in the father's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from orchestrator.aligning.alignment import LowCoverageError, align_mother, render_alignment
from orchestrator.descent.shares import parent_shares
from orchestrator.single_merge import merge_recipe
from orchestrator.verification import verify_child
from tests.checkpoint_files import assert_same_bits, read_tensors, tensor_bytes, weight_files
from tests.families import write_model
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.diagnostics import neurons
from workers.errors import BadInputError
from workers.merging import transplant
from workers.merging.plan import Plan
from workers.merging.sources import Source
from workers.storage.folder import FolderStore

TEXTS = [
    "".join("abcdefghijklmnopqrstuvwxyz"[(n * k * 7 + k * k) % 26] for k in range(60))
    for n in range(20)
]
HIDDEN, NEURONS, LAYERS = 32, 48, 4
PLANTED = 30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind, seed in (("gemma3", 0), ("gemma4", 0), ("qwen3_5", 1), ("qwen3_5_moe", 1)):
        write_model(folder / kind, kind, seed)
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    return folder


def rewrite(source: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint of one file, whose tensors `change` has changed."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    (file,) = weight_files(source)
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / file.name)
    return target


def mlp(layer: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.{role}_proj.weight"


def permutations() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randperm(NEURONS, generator=generator) for _ in range(LAYERS)]


def align(models: Path, father: Path, mother: Path, out: Path, **options: Any) -> dict[str, Any]:
    return align_mother(
        str(father), str(mother), str(out), str(models / "text.txt"), **({"threads": 1} | options)
    )


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen3_5"])
def test_a_father_with_permuted_neurons_is_given_back_exactly(
    kind: str, models: Path, tmp_path: Path
) -> None:
    def permute(tensors: dict[str, torch.Tensor]) -> None:
        signs = torch.where(torch.arange(NEURONS) % 3 == 0, -1, 1).bfloat16()
        for layer, order in enumerate(permutations()):
            tensors[mlp(layer, "gate")] = tensors[mlp(layer, "gate")][order]
            tensors[mlp(layer, "up")] = tensors[mlp(layer, "up")][order] * signs[:, None]
            tensors[mlp(layer, "down")] = tensors[mlp(layer, "down")][:, order] * signs

    father = models / kind
    mother = rewrite(father, tmp_path / "mother", permute)
    result = align(models, father, mother, tmp_path / "out", allow_low_coverage=True)
    assert_same_bits(read_tensors(tmp_path / "out"), read_tensors(father))
    assert result["moved_neurons"] == LAYERS * NEURONS
    assert result["coverage"]["total"] == 0
    assert result["correlation"] > 0.999
    with pytest.raises(LowCoverageError, match="her neurons are his"):
        align(models, father, mother, tmp_path / "refused")


def planted_mother(models: Path, father: Path, folder: Path) -> Path:
    """A Qwen3.5 model of 40 neurons in each layer: 30 of the father's, 10 of its own.

    Those of the father write something else, twice as loud.
    """

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(4)
        his = read_tensors(father)
        for layer, order in enumerate(permutations()):
            known = order[:PLANTED]
            for role in ("gate", "up"):
                own = tensors[mlp(layer, role)][:10]
                tensors[mlp(layer, role)] = torch.cat([his[mlp(layer, role)][known], own])
            noise = torch.randn(HIDDEN, PLANTED, generator=generator) * 0.005
            down = (his[mlp(layer, "down")][:, known].float() + noise) * 2
            own = tensors[mlp(layer, "down")][:, :10]
            tensors[mlp(layer, "down")] = torch.cat([down.bfloat16(), own], 1)

    rewrite(models / "qwen3_5", folder, plant)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_a_gemma_father_and_a_qwen_mother_have_a_child(
    kind: str, models: Path, tmp_path: Path
) -> None:
    father = models / kind
    mother = planted_mother(models, father, tmp_path / "mother")
    result = align(models, father, mother, tmp_path / "aligned", least_correlation=0.9)
    his, hers = read_tensors(father), read_tensors(mother)
    aligned = read_tensors(tmp_path / "aligned")
    assert aligned.keys() == his.keys()
    record = json.loads((tmp_path / "aligned" / "alignment.json").read_text())
    changed = 0
    for layer, order in enumerate(permutations()):
        known, kept = order[:PLANTED], order[PLANTED:]
        told = record["layers"][layer]
        assert (told["mother_layer"], told["moved"]) == (layer, PLANTED)
        assert told["scale"] == pytest.approx(0.5, rel=0.1)
        places = torch.zeros(NEURONS, dtype=torch.long)
        places[known] = torch.arange(1, PLANTED + 1)
        assert told["places"] == places.tolist()
        for role in ("gate", "up"):
            assert torch.equal(aligned[mlp(layer, role)], his[mlp(layer, role)])
        down, own = aligned[mlp(layer, "down")], his[mlp(layer, "down")]
        expected = (hers[mlp(layer, "down")][:, :PLANTED].float() * told["scale"]).bfloat16()
        assert torch.equal(down[:, known], expected)
        assert torch.equal(down[:, kept], own[:, kept])
        changed += int((down.view(torch.int16) != own.view(torch.int16)).sum())
    for name in his:
        if ".mlp.down_proj" not in name:
            assert tensor_bytes(aligned[name]) == tensor_bytes(his[name]), name
    total = sum(tensor.numel() for tensor in his.values())
    assert result["coverage"]["total"] == pytest.approx(changed / total, rel=1e-9)
    assert result["coverage"]["total"] > 0.01
    assert result["coverage"]["by_component"]["attention"] == 0
    assert "4 of 4 layers" in render_alignment(result)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"parents:\n  - {{name: father, path: {father}}}\n"
        f"  - {{name: mother, path: {tmp_path / 'aligned'}}}\n"
        "rules:\n  - {where: {components: [mlp]}, method: linear,\n"
        "     parameters: {weight: {father: 1, mother: 3}}}\n"
    )
    merge_recipe(str(recipe), str(tmp_path / "child"))
    child = read_tensors(tmp_path / "child")
    name = mlp(2, "down")
    blend = (0.25 * his[name].double() + 0.75 * aligned[name].double()).bfloat16()
    assert torch.equal(child[name], blend)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    ids = torch.tensor([[1, 5, 9, 4]])
    assert model.generate(ids, max_new_tokens=6, do_sample=False).shape[1] > 4
    assert bool(model(ids).logits.isfinite().all())


def test_what_is_written_can_be_verified_and_keeps_the_fathers_files(
    models: Path, tmp_path: Path
) -> None:
    father = write_model(tmp_path / "father", "gemma3", 0, max_shard_size="20KB")
    assert len(weight_files(father)) > 1
    mother = planted_mother(models, father, tmp_path / "mother")
    out = tmp_path / "out"
    align(models, father, mother, out)
    own, written = open_checkpoint(str(father)), open_checkpoint(str(out))
    assert [file.header.raw for file in written.weight_files] == [
        file.header.raw for file in own.weight_files
    ]
    for name in own.companions:
        assert (out / name).read_bytes() == (father / name).read_bytes()
    result = verify_child(str(out), [str(father)])
    assert result["status"] == "sound", result["problems"]
    lineage = json.loads((out / "lineage.json").read_text())
    assert [parent["fingerprint"] for parent in lineage["parents"]] == [
        own.fingerprint,
        open_checkpoint(str(mother)).fingerprint,
    ]
    assert result["changed"]["father"] == sum(t["changed"]["father"] for t in lineage["tensors"])
    layers = json.loads((out / "alignment.json").read_text())["layers"]
    for tensor in lineage["tensors"]:
        moved = layers[tensor["layer"]]["moved"] if tensor["component"] == "mlp" else 0
        shares = parent_shares(tensor["method"], tensor["parameters"], ["father", "mother"])
        assert shares["mother"] == pytest.approx(moved / NEURONS)
        assert sum(shares.values()) == pytest.approx(1)
    with pytest.raises(BadInputError, match="not empty"):
        align(models, father, mother, out)


def test_the_same_inputs_give_the_same_bytes(models: Path, tmp_path: Path) -> None:
    father = models / "gemma3"
    mother = planted_mother(models, father, tmp_path / "mother")
    for name in ("one", "two"):
        align(models, father, mother, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        if file.is_file() and not file.name.startswith("."):
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_the_size_of_the_pieces_does_not_matter(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    father = models / "gemma4"
    mother = planted_mother(models, father, tmp_path / "mother")
    align(models, father, mother, tmp_path / "whole", least_correlation=0.9)
    for module, name, size in (
        (transplant, "CHUNK_BYTES", 200),
        (transplant, "PART_BYTES", 5000),
        (neurons, "CHUNK_TOKENS", 97),
    ):
        monkeypatch.setattr(module, name, size)
    align(models, father, mother, tmp_path / "pieces", least_correlation=0.9)
    assert_same_bits(read_tensors(tmp_path / "pieces"), read_tensors(tmp_path / "whole"))


def test_a_mother_that_has_nothing_in_common_is_refused(models: Path, tmp_path: Path) -> None:
    """Two models that were never related: what correlates does so by chance."""
    out = tmp_path / "out"
    with pytest.raises(LowCoverageError, match=r"less than 1%.*beyond chance"):
        align(models, models / "gemma4", models / "qwen3_5", out)
    assert not out.exists() or not [file for file in out.rglob("*") if file.stat().st_size]
    # Who insists gets what correlates at all.
    result = align(models, models / "gemma4", models / "qwen3_5", out, least_correlation=0.1)
    assert result["coverage"]["by_component"]["mlp"] > 0.5
    record = json.loads((out / "alignment.json").read_text())
    assert all(layer["correlation"] < layer["chance_correlation"] for layer in record["layers"])


def test_a_mixture_of_experts_is_skipped(models: Path, tmp_path: Path) -> None:
    with pytest.raises(LowCoverageError, match=r"mixture of experts"):
        align(models, models / "gemma3", models / "qwen3_5_moe", tmp_path / "out")
    result = align(
        models,
        models / "gemma3",
        models / "qwen3_5_moe",
        tmp_path / "out",
        allow_low_coverage=True,
    )
    assert result["moved_neurons"] == 0
    assert_same_bits(read_tensors(tmp_path / "out"), read_tensors(models / "gemma3"))


def test_a_father_whose_networks_have_no_activation_of_their_own_is_refused(
    models: Path, tmp_path: Path
) -> None:
    """In LFM2 it is part of the code."""
    father, mother = (
        write_model(tmp_path / str(seed), "lfm2", seed, max_shard_size="10GB") for seed in (0, 1)
    )
    with pytest.raises(BadInputError, match=r"^Lfm2ForCausalLM: the feed-forward network of layer"):
        align(models, father, mother, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mother_with_values_that_are_no_numbers_is_refused(models: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[mlp(1, "down")][3, :] = float("inf")

    planted = planted_mother(models, models / "gemma3", tmp_path / "planted")
    mother = rewrite(planted, tmp_path / "mother", damage)
    with pytest.raises(BadInputError, match=r"layers\.1\.mlp\.down_proj.*NaN or infinite"):
        align(models, models / "gemma3", mother, tmp_path / "out")


def transplant_some(father: Path, mother: Path, out: Path, moved: list[int]) -> Any:
    """The mother's neurons in these places of layer 1, each where it was."""
    own, hers = (ArchitectureMap.of(open_checkpoint(str(folder))) for folder in (father, mother))
    places = numpy.full(NEURONS, -1)
    places[moved] = moved
    matching = transplant.NeuronMatching(
        places, numpy.zeros(NEURONS, bool), numpy.ones(NEURONS), 1.0
    )
    plan = Plan({"father": own}, None)
    written = transplant.write_transplant(plan, hers, {1: (1, matching)}, FolderStore(out))
    written.publish()
    return written


def test_what_was_no_number_in_the_father_does_not_make_the_mother_damaged(
    models: Path, tmp_path: Path
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[mlp(1, "gate")][5, 0] = float("nan")

    def negate(tensors: dict[str, torch.Tensor]) -> None:
        tensors[mlp(1, "gate")].neg_()

    father = rewrite(models / "gemma3", tmp_path / "father", damage)
    mother = rewrite(models / "gemma3", tmp_path / "mother", negate)
    written = transplant_some(father, mother, tmp_path / "kept", [7])
    assert written.not_finite == {"layers.1.mlp.gate_proj.weight": 1}
    gate = read_tensors(tmp_path / "kept")[mlp(1, "gate")]
    assert torch.equal(gate[7], read_tensors(mother)[mlp(1, "gate")][7])
    # Her neuron takes the place of his damaged one.
    assert transplant_some(father, mother, tmp_path / "healed", [5]).not_finite == {}
    damaged = rewrite(models / "gemma3", tmp_path / "damaged", damage)
    with pytest.raises(BadInputError, match=r"layers\.1\.mlp\.gate_proj.*NaN or infinite"):
        transplant_some(father, damaged, tmp_path / "refused", [5])


def test_the_mother_is_read_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[tuple[int, str], int] = {}

    class CountingSource(Source):
        def read(self, tensor: Any, first: int, count: int) -> torch.Tensor:
            key = id(self), tensor.name
            read[key] = read.get(key, 0) + count
            return super().read(tensor, first, count)

    monkeypatch.setattr(transplant, "Source", CountingSource)
    monkeypatch.setattr(transplant, "CHUNK_BYTES", 200)
    moved = list(range(0, NEURONS, 2))
    transplant_some(models / "gemma3", models / "gemma3", tmp_path / "out", moved)
    gate = "layers.1.mlp.gate_proj.weight"
    assert [count for (_, name), count in read.items() if name == gate] == [NEURONS * HIDDEN] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n\n", "no calibration text"),
        ("a.jsonl", '{"text": "abc"}\n{"word": 1}\n', "line 2"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_calibration_files_that_are_none(
    name: str, content: str | None, message: str, models: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message):
        align_mother(
            str(models / "gemma3"),
            str(models / "qwen3_5"),
            str(tmp_path / "out"),
            str(tmp_path / name),
        )


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", r"^--device: 'tpu' is neither cpu nor cuda$"),
        (
            "cuda:99",
            r"^--device: cuda:99, but this process sees .* CUDA device.*: use --device cpu$",
        ),
    ],
)
def test_devices_that_are_none(device: str, message: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        align(models, models / "gemma3", models / "gemma4", tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_a_file_of_prompts_is_a_calibration_text(models: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt" if n % 2 else "text": text}) for n, text in enumerate(TEXTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    mother = planted_mother(models, models / "gemma3", tmp_path / "mother")
    for name, file in (("one", tmp_path / "prompts.jsonl"), ("two", models / "text.txt")):
        align_mother(
            str(models / "gemma3"), str(mother), str(tmp_path / name), str(file), threads=1
        )
    one, two = (
        json.loads((tmp_path / name / "alignment.json").read_text()) for name in ("one", "two")
    )
    assert one["layers"] == two["layers"]
    assert one["calibration"]["tokens"] == two["calibration"]["tokens"] == 20 * 60
