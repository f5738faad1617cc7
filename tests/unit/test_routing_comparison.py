"""How children and parents route, against plain runs of whole models in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchestrator.experts.router import with_routers
from orchestrator.experts.routing_table import routing_record, routing_table
from tests.checkpoint_files import recipe_for, rule, write_child
from tests.families import write_tokenizer
from tests.mixtures import write_mixtures
from tests.unit.test_probe import write_kind
from workers.checkpoints import ArchitectureMap, Checkpoint, open_checkpoint
from workers.diagnostics.streaming import StreamedModel
from workers.errors import BadInputError
from workers.experts.calibration import Calibration
from workers.experts.calibration_order import CalibrationOrder
from workers.experts.merged_model import StreamedChild
from workers.experts.plain_routers import plain_routers
from workers.experts.routing_comparison import CHILD, compare_routing, listen
from workers.merging import ParentReference, Recipe
from workers.merging.executor import Merger

TEXTS = {
    "donor1": ("abcd efg abcd", "hello there"),
    "donor2": ("what is this?", "hello there", "zyx"),
}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    places = write_mixtures(tmp_path_factory.mktemp("mixtures"))
    return {name: open_checkpoint(str(place)) for name, place in places.items()}


def mean_of(mixtures: dict[str, Checkpoint]) -> Recipe:
    parents = {name: mixtures[name] for name in ("donor1", "donor2")}
    return recipe_for(Merger(parents), rule("linear", weight=1.0))


def plain_routing(folder: str, texts: tuple[str, ...]) -> dict[int, torch.Tensor]:
    """Of each layer the softmax of the router's products, `[tokens, E]`, by a whole model in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float64", experts_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[int, list[torch.Tensor]] = {}

    def keep(module: Any, arguments: Any, output: Any, number: int) -> None:
        states = arguments[0].reshape(-1, model.config.hidden_size)
        found.setdefault(number, []).append((states @ module.weight.T).softmax(-1))

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda module, arguments, output, number=number: keep(module, arguments, output, number)
        )
    with torch.inference_mode():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
    return {number: torch.cat(parts) for number, parts in found.items()}


def test_overlap_and_divergence_are_those_of_plain_runs(
    mixtures: dict[str, Checkpoint], tmp_path: Path
) -> None:
    parents = {name: mixtures[name] for name in ("donor1", "donor2")}
    recipe = mean_of(mixtures)
    write_child(Merger(parents), recipe, tmp_path / "child")
    rows = compare_routing(recipe, parents, None, TEXTS, dtype="float32")
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for name, parent in parents.items():
        own = plain_routing(parent.location, TEXTS[name])
        child = plain_routing(str(tmp_path / "child"), TEXTS[name])
        for row in rows:
            p, q = own[row["layer"]], child[row["layer"]]
            told = row["models"][CHILD]["against"][name]
            assert told["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-5)
            assert told["kl"] > 1e-3
            shared = [
                len(set(one.topk(2).indices.tolist()) & set(other.topk(2).indices.tolist())) / 2
                for one, other in zip(p, q, strict=True)
            ]
            assert told["overlap"] == pytest.approx(sum(shared) / len(shared), abs=1e-9)
            counts = torch.bincount(p.topk(2).indices.reshape(-1), minlength=4)
            shares = [float(n) / float(counts.sum()) for n in counts if n]
            assert row["parents"][name]["choices"] == counts.tolist()
            assert row["parents"][name]["load_entropy"] == pytest.approx(
                -sum(share * math.log2(share) for share in shares)
            )
            assert row["parents"][name]["tokens"] == len(p)


def test_a_child_that_is_a_parent_routes_as_that_one(mixtures: dict[str, Checkpoint]) -> None:
    parents = {name: mixtures[name] for name in ("donor1", "donor2")}
    recipe = recipe_for(Merger(parents), rule("passthrough", source="donor2"))
    for row in compare_routing(recipe, parents, None, TEXTS):
        against = row["models"][CHILD]["against"]
        assert against["donor2"] == {"overlap": 1.0, "kl": 0.0}
        assert against["donor1"]["overlap"] < 1.0 and against["donor1"]["kl"] > 0.0


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_5_moe"])
def test_a_streamed_child_has_the_bits_of_the_written_one(kind: str, tmp_path: Path) -> None:
    """Also where experts are fused in one parent, and attention is linear."""
    parents = {
        name: open_checkpoint(str(write_kind(tmp_path / name, kind, seed)))
        for seed, name in enumerate(("one", "two"), 1)
    }
    recipe = recipe_for(Merger(parents), rule("slerp", t=0.4))
    write_child(Merger(parents), recipe, tmp_path / "child")
    tokens = [torch.tensor([[1, 5, 9, 30, 7]]), torch.tensor([[4, 4, 20]])]
    streamed = listen(StreamedChild(recipe, parents, None), tokens)
    written = listen(StreamedModel(open_checkpoint(str(tmp_path / "child"))), tokens)
    assert streamed.keys() == written.keys() == {0, 1, 2, 3}
    for layer, routing in streamed.items():
        assert all(map(torch.equal, routing, written[layer]))


def test_routers_of_another_kind_are_refused(tmp_path: Path) -> None:
    parents = {"one": open_checkpoint(str(write_kind(tmp_path / "one", "deepseek_v3")))}
    recipe = recipe_for(Merger(parents), rule("passthrough", source="one"))
    with pytest.raises(BadInputError, match=r"more than one matrix|softmax"):
        compare_routing(recipe, parents, None, {"one": ("abc",)})
    with pytest.raises(BadInputError, match="more than one matrix"):
        plain_routers(ArchitectureMap.of(parents["one"]))


def test_a_child_of_another_form_is_refused(mixtures: dict[str, Checkpoint]) -> None:
    parents = {name: mixtures[name] for name in ("donor1", "donor2")}
    recipe = replace(mean_of(mixtures), layers=({"donor1": (0, 1)}, {"donor2": (0, 3)}))
    with pytest.raises(BadInputError, match="layers"):
        compare_routing(recipe, parents, None, TEXTS)


def test_the_table_has_means_over_the_layers() -> None:
    def told(kl: float, choices: list[int], against: bool = True) -> dict[str, Any]:
        own = {"tokens": 40, "choices": choices, "load_entropy": 1.0}
        return own | ({"against": {"mother": {"overlap": 0.5, "kl": kl}}} if against else {})

    rows = [
        {
            "layer": layer,
            "per_token": 2,
            "models": {CHILD: told(kl, choices)},
            "parents": {"mother": told(0, [20, 20, 20, 20], against=False)},
        }
        for layer, kl, choices in ((1, 0.25, [40, 0, 40, 0]), (3, 0.75, [20, 20, 39, 1]))
    ]
    record = routing_record(rows, sets={}, held_out=True)
    assert record["layers"][0]["models"][CHILD]["dead"] == [1, 3]
    assert "choices" not in record["layers"][0]["models"][CHILD]
    table = routing_table(record)
    assert table[1][1:] == ["50.0%, 0.5000", "50.0%", "2"]
    assert table[2] == ["mother itself", "", "50.0%", "0"]


def permuted(folder: Path, place: Path) -> dict[int, tuple[int, ...]]:
    """A copy of a model whose experts have other numbers; where the original's are now, by layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    orders = {}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            order = torch.randperm(4, generator=torch.Generator().manual_seed(number + 1))
            for weight in (layer.mlp.gate.weight, *layer.mlp.experts.parameters()):
                weight.copy_(weight[order].clone())
            orders[number] = tuple(order.argsort().tolist())
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return {layer: order for layer, order in orders.items() if order != (0, 1, 2, 3)}


def test_matched_experts_are_calibrated_and_compared_as_if_they_had_one_order(
    mixtures: dict[str, Checkpoint], tmp_path: Path
) -> None:
    orders = permuted(tmp_path / "permuted", Path(mixtures["donor2"].location))
    assert len(orders) >= 3
    other = open_checkpoint(str(tmp_path / "permuted"))
    found = []
    for donor, given in ((mixtures["donor2"], {}), (other, {"donor2": orders}), (other, {})):
        parents = {"donor1": mixtures["donor1"], "donor2": donor}
        references = tuple(ParentReference(name, p.fingerprint) for name, p in parents.items())
        recipe = Recipe(references, (rule("linear", weight=1.0),), experts=given)
        keep = with_routers(recipe, "keep")
        order = CalibrationOrder(keep.to_dict(), TEXTS, TEXTS)
        calibrated = Calibration(order, parents, None, {}).calibrate(0)
        found.append((compare_routing(recipe, parents, None, TEXTS), calibrated))
    (straight, router), (matched, same), (_, mixed) = found
    assert same.values == router.values and same.solution == router.solution
    assert mixed.values != router.values
    for row, twin in zip([*straight, router.routing], [*matched, same.routing], strict=True):
        for name, told in row["models"].items():
            other = twin["models"][name]
            assert other["choices"] == told["choices"]
            for parent, against in told["against"].items():
                # The donor's own run adds up in another order.
                assert other["against"][parent]["kl"] == pytest.approx(against["kl"], rel=1e-4)
                assert other["against"][parent]["overlap"] == against["overlap"]
        assert twin["parents"]["donor2"]["choices"] == row["parents"]["donor2"]["choices"]


def test_a_calibration_goes_on_behind_routers_that_are_known(
    mixtures: dict[str, Checkpoint],
) -> None:
    parents = {name: mixtures[name] for name in ("donor1", "donor2")}
    keep = with_routers(mean_of(mixtures), "keep")
    order = CalibrationOrder(keep.to_dict(), TEXTS, TEXTS)
    whole = Calibration(order, parents, None, {})
    layers = [whole.calibrate(layer) for layer in range(4)]
    later = Calibration(order, parents, None, {n: layers[n].values for n in range(2)})
    assert [later.calibrate(layer) for layer in (2, 3)] == layers[2:]
    assert later.known == whole.known
