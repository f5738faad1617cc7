"""Matching of experts: planted permutations are found, and the numbers are those of the plain formula."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers

from orchestrator.experts.matching import Matching, match_experts
from tests.checkpoint_files import local_calls, open_merger, read_tensors, to_float64
from tests.expert_parents import (
    EXPERTS,
    HIDDEN,
    INNER,
    copy_reordered,
    inverse,
    random_experts,
    reordered,
    unfused,
    write_experts,
)
from tests.families import write_model
from workers.checkpoints import open_checkpoint
from workers.diagnostics.calibration import CalibrationSet, PromptPair
from workers.errors import BadInputError
from workers.experts import matching as matching_module
from workers.experts.expert_inputs import expert_inputs
from workers.experts.matching import Experts, assign, match_by_outputs, match_by_weights, spread
from workers.storage.folder import FolderStore

PLANTED = {0: (3, 0, 5, 1, 4, 2), 1: (1, 2, 0, 3, 5, 4)}
SET = CalibrationSet(
    "letters",
    (
        PromptPair("1", "what is this?", "who are you then"),
        PromptPair("2", "ab cd efg hij klm nop qrs tuv", "z y x"),
    ),
    "hash",
)
FATHER = random_experts(1)
STEM = "model.layers.{}.mlp."


def experts_of(folder: Path, layer: int) -> Experts:
    return Experts(open_checkpoint(str(folder)), layer)


def states(tokens: int = 40, seed: int = 5) -> torch.Tensor:
    return torch.randn((tokens, HIDDEN), generator=torch.Generator().manual_seed(seed))


def centred_cosines(one: numpy.ndarray, two: numpy.ndarray) -> numpy.ndarray:
    """Of `[experts, elements]` each, in float64."""
    one, two = (values - values.mean(axis=0) for values in (one, two))
    lengths = numpy.outer(numpy.linalg.norm(one, axis=1), numpy.linalg.norm(two, axis=1))
    return numpy.asarray(one @ two.T / lengths)


def parts(tensors: dict[str, torch.Tensor], layer: int) -> list[numpy.ndarray]:
    """gate, up, down and router `[experts, ...]` of fused tensors."""
    stem = STEM.format(layer)
    fused = to_float64(tensors[f"{stem}experts.gate_up_proj"])
    down = to_float64(tensors[f"{stem}experts.down_proj"])
    return [fused[:, :INNER], fused[:, INNER:], down, to_float64(tensors[f"{stem}gate.weight"])]


def expected_quality(similarity: numpy.ndarray) -> tuple[tuple[int, ...], list[float]]:
    """By trying every order there is."""
    places = range(len(similarity))
    best = max(itertools.permutations(places), key=lambda order: similarity[places, order].sum())
    matched = [similarity[place, best[place]] for place in places]
    seconds = [max(similarity[p, e] for e in places if e != best[p]) for p in places]
    margins = numpy.subtract(matched, seconds)
    return best, [float(numpy.mean(matched)), float(min(matched)), float(margins.mean())]


@pytest.mark.parametrize("by", ["weights", "outputs"])
@pytest.mark.parametrize("change", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("is_fused", [True, False])
def test_a_planted_permutation_is_found(
    by: str, change: float, is_fused: bool, tmp_path: Path
) -> None:
    """Of a donor that was trained on, too, and whatever its layout; and with the formula's own numbers."""
    donor = reordered(random_experts(2, FATHER, change), PLANTED)
    folders = (
        write_experts(tmp_path / "father", FATHER),
        write_experts(tmp_path / "donor", donor if is_fused else unfused(donor)),
    )
    for layer, order in PLANTED.items():
        father, other = (experts_of(folder, layer) for folder in folders)
        if by == "weights":
            found = match_by_weights(father, other)
            pairs = zip(parts(FATHER, layer), parts(donor, layer), strict=True)
            similarity = numpy.mean(
                [centred_cosines(*(v.reshape(EXPERTS, -1) for v in pair)) for pair in pairs], axis=0
            )
        else:
            found = match_by_outputs(father, other, states())
            similarity = centred_cosines(*(plain_outputs(of, layer) for of in (FATHER, donor)))
        expected, numbers = expected_quality(similarity)
        assert found.order == expected == inverse(order)
        assert [found.similarity, found.least, found.margin] == pytest.approx(numbers, abs=2e-6)
        assert found.moved == sum(place != number for place, number in enumerate(order))
        assert not found.is_poor


def plain_outputs(tensors: dict[str, torch.Tensor], layer: int) -> numpy.ndarray:
    gate, up, down, _ = parts(tensors, layer)
    given = states().double().numpy()
    inner = numpy.einsum("th,eih->eti", given, gate)
    inner = inner / (1 + numpy.exp(-inner)) * numpy.einsum("th,eih->eti", given, up)
    return numpy.asarray(numpy.einsum("eti,ehi->eth", inner, down).reshape(EXPERTS, -1))


def test_fine_tunes_keep_their_places(tmp_path: Path) -> None:
    father = write_experts(tmp_path / "father", FATHER)
    donor = write_experts(tmp_path / "donor", random_experts(3, FATHER, 0.05))
    for layer in (0, 1):
        one, other = experts_of(father, layer), experts_of(donor, layer)
        for found in (match_by_weights(one, other), match_by_outputs(one, other, states())):
            assert (found.order, found.moved) == (tuple(range(EXPERTS)), 0)
            assert found.similarity > 0.99
            assert found.margin > 0.8


def test_neurons_in_another_order_hide_experts_from_weights_only(tmp_path: Path) -> None:
    """Their matrices have nothing in common then; what they compute is the same."""
    donor = reordered(FATHER, PLANTED)
    mixed = torch.randperm(INNER, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        up, down = (f"{STEM.format(layer)}experts.{role}_proj" for role in ("gate_up", "down"))
        donor[up] = torch.cat([half[:, mixed] for half in donor[up].chunk(2, dim=1)], dim=1)
        donor[down] = donor[down][:, :, mixed].contiguous()
        del donor[f"{STEM.format(layer)}gate.weight"]  # else the router alone would tell
    folders = (
        write_experts(tmp_path / "father", FATHER),
        write_experts(tmp_path / "donor", donor),
    )
    father, other = (experts_of(folder, 0) for folder in folders)
    by_outputs = match_by_outputs(father, other, states())
    assert by_outputs.order == inverse(PLANTED[0])
    assert by_outputs.similarity == pytest.approx(1.0, abs=1e-4)
    assert match_by_weights(father, other).is_poor


def test_what_is_compared_at_once_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = reordered(random_experts(2, FATHER, 0.3), PLANTED)
    folders = (
        write_experts(tmp_path / "father", FATHER),
        write_experts(tmp_path / "donor", donor),
    )
    father, other = (experts_of(folder, 1) for folder in folders)
    whole = match_by_weights(father, other)
    monkeypatch.setattr(matching_module, "BLOCK_BYTES", 4 * EXPERTS * 7)
    pieces = match_by_weights(father, other)
    assert pieces.order == whole.order
    assert pieces.similarity == pytest.approx(whole.similarity, abs=2e-6)
    monkeypatch.setattr(matching_module, "OUTPUT_BYTES", 4 * EXPERTS * HIDDEN * 10)
    few = match_by_outputs(father, other, states())
    assert few == match_by_outputs(father, other, states()[::4])
    assert torch.equal(spread(states(), 10), states()[::4])


def test_experts_that_are_all_alike_stay(tmp_path: Path) -> None:
    """Grown from one dense layer and not trained since: nothing can be told, and that is said."""
    same = dict(FATHER)
    for name, value in FATHER.items():
        if ".experts." in name or ".gate." in name:
            same[name] = value[:1].expand_as(value).contiguous()
    folder = write_experts(tmp_path / "father", same)
    found = match_by_weights(experts_of(folder, 0), experts_of(folder, 0))
    assert found.order == tuple(range(EXPERTS))
    assert found.is_poor
    alone = assign(3, numpy.zeros((1, 1)))
    assert (alone.order, alone.is_poor) == ((0,), False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"experts.down_proj": torch.zeros(EXPERTS, HIDDEN, INNER + 1)},
            "expert 0 of .* has the matr",
        ),
        (
            {
                "experts.down_proj": torch.zeros(4, HIDDEN, INNER),
                "experts.gate_up_proj": torch.zeros(4, 2 * INNER, HIDDEN),
            },
            "has 6 experts, .* 4: only as many can be matched",
        ),
    ],
)
def test_what_cannot_be_matched(
    changed: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    father = write_experts(tmp_path / "father", FATHER)
    other = FATHER | {f"{STEM.format(0)}{name}": value for name, value in changed.items()}
    donor = write_experts(tmp_path / "donor", other)
    with pytest.raises(BadInputError, match=message):
        match_by_weights(experts_of(father, 0), experts_of(donor, 0))
    with pytest.raises(BadInputError, match="layer 2 has no experts to match"):
        experts_of(father, 2)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["experts.down_proj", "gate.weight"])
def test_weights_that_are_not_finite_are_refused(value: float, name: str, tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in FATHER.items()}
    tensors[STEM.format(0) + name][2].view(-1)[3] = value
    one, other = (
        experts_of(write_experts(tmp_path / part, of), 0)
        for part, of in (("father", FATHER), ("donor", tensors))
    )
    with pytest.raises(BadInputError, match=r"donor: expert 2 of layer 0 has weights that are not"):
        match_by_weights(one, other)


# A whole model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A real architecture, a relative of it, the relative with its experts moved, and a stranger."""
    root = tmp_path_factory.mktemp("models")
    father = write_model(root / "father", "qwen3_moe", 0)
    tuned = write_model(root / "tuned", "qwen3_moe", 1, spread=0.002)
    moved = copy_reordered(tuned, root / "moved", ORDERS)
    stranger = write_model(root / "stranger", "qwen3_moe", 7)
    return {"father": father, "tuned": tuned, "moved": moved, "stranger": stranger}


ORDERS = {0: (2, 0, 1, 3), 2: (3, 2, 1, 0), 3: (0, 1, 3, 2)}


def test_the_moved_model_is_the_same_model(models: dict[str, Path]) -> None:
    """So the planted permutations move experts and routers alike, as transformers reads them."""
    ids = torch.arange(3, 30).view(1, -1)
    outputs = [
        transformers.AutoModelForCausalLM.from_pretrained(models[name])(ids).logits
        for name in ("tuned", "moved")
    ]
    assert torch.allclose(*outputs, atol=1e-2)


def test_the_states_that_experts_are_given(models: dict[str, Path]) -> None:
    """Against the model run whole by transformers."""
    found = expert_inputs(open_checkpoint(str(models["father"])), (SET,))
    model = transformers.AutoModelForCausalLM.from_pretrained(models["father"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["father"])
    seen: dict[int, list[torch.Tensor]] = {}
    for layer, module in enumerate(model.model.layers):
        module.post_attention_layernorm.register_forward_hook(
            lambda _, given, out, layer=layer: seen.setdefault(layer, []).append(out[0])
        )
    for pair in SET.pairs:
        for text in (pair.conditioned, pair.generic):
            with torch.no_grad():
                model(torch.tensor([tokenizer(text)["input_ids"]]))
    assert found.keys() == seen.keys()
    for layer, given in seen.items():
        assert torch.equal(found[layer], torch.cat(given).float())


@pytest.mark.parametrize("by", ["weights", "outputs"])
def test_all_donors_are_matched_by_several_workers(by: str, models: dict[str, Path]) -> None:
    merger = open_merger(models)
    found = [
        match_experts(
            merger.parents, by, (SET,), local_calls(merger, FolderStore(models["father"]), count)
        )
        for count in (1, 2)
    ]
    assert found[0] == found[1]
    matching = found[0]
    assert "tuned" not in matching.orders
    wanted = {layer: inverse(order) for layer, order in ORDERS.items()}
    assert matching.orders["moved"] == wanted
    quality = matching.quality
    assert quality["moved"]["moved"] == 3 + 4 + 2
    assert quality["moved"]["poor"] == quality["tuned"]["poor"] == []
    assert quality["stranger"]["poor"] == [0, 1, 2, 3]
    assert quality["stranger"]["experts"] == 16
    again = Matching.from_dict(matching.to_dict(), list(models))
    assert again == matching
    assert "In the layers 0, 1, 2, 3 hardly so" in again.notes[2]


def test_a_father_without_experts(tmp_path: Path) -> None:
    dense = {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}
    merger = open_merger({name: write_experts(tmp_path / name, dense) for name in "ab"})
    calls: Any = local_calls(merger, FolderStore(tmp_path))
    with pytest.raises(BadInputError, match="has no routed experts that could be matched"):
        match_experts(merger.parents, "weights", (), calls)
    assert read_tensors(tmp_path / "a")
