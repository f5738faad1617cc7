"""`darwin merge` with `router: harc`, as a user runs it, against plain runs of whole models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from orchestrator import single_merge
from orchestrator.experts import calibrating
from orchestrator.experts.router import split_prompts
from orchestrator.single_merge import merge_recipe
from orchestrator.verification import verify_child
from tests.campaigns import digests, run_darwin
from tests.checkpoint_files import read_tensors
from tests.mixtures import write_recipe
from tests.unit.test_routing_comparison import permuted, plain_routing
from workers.checkpoints import open_checkpoint
from workers.diagnostics.calibration import read_calibration_set
from workers.errors import BadInputError

DONORS = ("donor1", "donor2")
ROUTER = "model.layers.{}.mlp.gate.weight"


def prompts(folder: Path, donor: str, held_out: bool) -> tuple[str, ...]:
    return split_prompts(read_calibration_set(folder / f"{donor}_prompts.jsonl"))[held_out]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The constructed case, merged with its routers calibrated (`child`) and kept (`kept`)."""
    folder = tmp_path_factory.mktemp("case")
    recipe = write_recipe(folder)
    run_darwin("merge", str(recipe), str(folder / "child"))
    data = yaml.safe_load(recipe.read_text()) | {"router": "keep"}
    (folder / "kept.yaml").write_text(yaml.safe_dump(data))
    merge_recipe(str(folder / "kept.yaml"), str(folder / "kept"))
    return folder


def test_calibrated_routers_route_more_like_the_donors_than_kept_ones(merged: Path) -> None:
    """On prompts that were held out: measured here by plain runs, and told by lineage and card."""
    told = json.loads((merged / "child" / "lineage.json").read_text())["routing"]
    assert told["held_out"]
    assert list(told["layers"][0]["models"]) == ["keep", "as_experts", "harc"]
    for donor in DONORS:
        texts = prompts(merged, donor, held_out=True)
        own = plain_routing(str(merged / donor), texts)
        divergence = {}
        for kind, folder in (("keep", "kept"), ("harc", "child")):
            found = plain_routing(str(merged / folder), texts)
            divergence[kind] = {
                layer: float((p * (p / found[layer]).log()).sum(-1).mean())
                for layer, p in own.items()
            }
            for layer in told["layers"]:
                against = layer["models"][kind]["against"][donor]
                # Here float64, there bf16 but for the router.
                assert against["kl"] == pytest.approx(divergence[kind][layer["layer"]], rel=0.1)
        kept, calibrated = (sum(divergence[kind].values()) for kind in ("keep", "harc"))
        assert calibrated < 0.5 * kept
        rows = [layer["models"]["as_experts"]["against"][donor]["kl"] for layer in told["layers"]]
        assert calibrated < 0.5 * sum(rows)
    card = (merged / "child" / "README.md").read_text()
    assert "| calibrated (HARC), as in this child |" in card and "| the father's, kept |" in card


def test_each_router_solves_its_equation_behind_the_calibrated_layers(merged: Path) -> None:
    """By the dense normal equations, over what reaches the routers of the written child: that is what each
    was calibrated on only if the layers before it were merged and calibrated by then."""
    child = read_tensors(merged / "child")
    donors = {name: read_tensors(merged / name) for name in DONORS}
    states = {
        name: router_inputs(merged / "child", prompts(merged, name, held_out=False))
        for name in DONORS
    }
    for layer in range(4):
        matrix: Any = 0.0
        right: Any = 0.0
        for name in DONORS:
            x = states[name][layer].double()
            router = donors[name][ROUTER.format(layer)].double()
            p = (x @ router.T).softmax(-1)
            hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            own = torch.einsum("tab,ti,tj->aibj", hessians, x, x).reshape(128, 128) / len(x)
            own = 0.9 * own + 0.1 * torch.diag(own.diagonal())
            matrix = matrix + own
            right = right + own @ router.reshape(-1)
        wanted = torch.linalg.solve(matrix, right)
        found = child[ROUTER.format(layer)].double().reshape(-1)
        assert torch.allclose(found, wanted, rtol=2**-8, atol=1e-4)
        first = donors["donor1"][ROUTER.format(layer)].double().reshape(-1)
        assert not torch.allclose(first, wanted, rtol=0.1, atol=0.1)


def router_inputs(folder: Path, texts: tuple[str, ...]) -> dict[int, torch.Tensor]:
    """What reaches each layer's router `[tokens, H]`, in a whole model with its own dtype."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_pre_hook(
            lambda module, arguments, number=number: found.setdefault(number, []).append(
                arguments[0].reshape(-1, 32)
            )
        )
    with torch.inference_mode():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
    return {number: torch.cat(parts) for number, parts in found.items()}


def test_the_routers_lie_beside_the_child_which_is_whole(merged: Path) -> None:
    routers = read_tensors(merged / "child" / "routers")
    child = read_tensors(merged / "child")
    assert list(routers) == [ROUTER.format(layer) for layer in range(4)]
    assert all(child[name].equal(values) for name, values in routers.items())
    lineage = json.loads((merged / "child" / "lineage.json").read_text())
    *_, last = lineage["parents"]
    place = open_checkpoint(str(merged / "child" / "routers"))
    assert (last["name"], last["gives"]) == ("routers", "routers")
    assert last["fingerprint"] == place.fingerprint
    assert lineage["recipe"]["rules"][0] == {
        "where": {"components": ["router"]},
        "method": "passthrough",
        "parameters": {"source": "routers"},
        "parents": ["routers"],
    }
    for part in ("child", "child/routers"):
        assert verify_child(str(merged / part), [])["status"] == "sound"
    assert list(verify_child(str(merged / "child"), [])["changed"]) == ["father", *DONORS]
    (told,) = [a for a in lineage["ancestry"]["child"]["parents"] if a["name"] == "routers"]
    ancestor = lineage["ancestry"]["ancestors"][told["node"]]
    assert [parent["name"] for parent in ancestor["parents"]] == list(DONORS)


def test_the_recipe_with_routers_as_a_parent_can_be_merged_again(
    merged: Path, tmp_path: Path
) -> None:
    """Written down by hand, with the routers by their place: the same recipe, the same bytes."""
    data = yaml.safe_load((merged / "recipe.yaml").read_text())
    del data["router"]
    names = [parent["name"] for parent in data["parents"]]
    data["parents"].append({"name": "routers", "path": str(merged / "child" / "routers")})
    own = {"method": "passthrough", "parameters": {"source": "routers"}, "parents": ["routers"]}
    data["rules"] = [
        {"where": {"components": ["router"]}, **own},
        *({**rule, "parents": names} for rule in data["rules"]),
    ]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(data))
    again = merge_recipe(str(tmp_path / "again.yaml"), str(tmp_path / "again"))
    lineage = json.loads((merged / "child" / "lineage.json").read_text())
    assert again["recipe_id"] == lineage["recipe_id"]
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (merged / "child", tmp_path / "again")
    ]
    assert weights[0] == weights[1]


def test_experts_are_matched_before_routers_are_calibrated(merged: Path, tmp_path: Path) -> None:
    """A donor whose experts have other numbers gives the same routers, and the same child."""
    assert permuted(tmp_path / "permuted", merged / "donor2")
    data = yaml.safe_load((merged / "recipe.yaml").read_text()) | {"match_experts": "weights"}
    data["parents"][-1]["path"] = str(tmp_path / "permuted")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    merge_recipe(str(tmp_path / "recipe.yaml"), str(tmp_path / "child"))
    for part in ("child", "child/routers"):
        found, wanted = (root / part / "model.safetensors" for root in (tmp_path, merged))
        assert found.read_bytes() == wanted.read_bytes()


class InterruptedHereError(Exception):
    pass


def test_an_interrupted_calibration_goes_on_behind_its_last_layer(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended from the progress bar, whose steps come right behind the record of each layer."""
    steps: list[int] = []

    def bar(last: int) -> Callable[..., Any]:
        @contextmanager
        def steps_bar(*given: Any) -> Iterator[Callable[[int], None]]:
            def notify(done: int) -> None:
                steps.append(done)
                if sum(steps) == last:
                    raise InterruptedHereError

            yield notify

        return steps_bar

    recipe, out = str(merged / "recipe.yaml"), tmp_path / "child"
    monkeypatch.setattr(calibrating, "steps_bar", bar(2))
    with pytest.raises(InterruptedHereError):
        merge_recipe(recipe, str(out))
    assert steps == [0, 1, 1]
    assert not (out / "config.json").exists()

    other = yaml.safe_load((merged / "recipe.yaml").read_text()) | {"seed": 5}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(BadInputError, match="holds routers that were calibrated with other"):
        merge_recipe(str(tmp_path / "other.yaml"), str(out))

    steps.clear()
    monkeypatch.setattr(calibrating, "steps_bar", bar(-1))
    merge_recipe(recipe, str(out))
    assert steps == [2, 1, 1]
    assert digests(str(out)) == digests(str(merged / "child"))

    with pytest.raises(BadInputError, match="is not empty"):
        merge_recipe(recipe, str(out))


def test_a_set_that_the_tokenizer_does_not_know_is_refused_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    """The place is free for the recipe that was mended."""
    recipe = {
        "parents": [{"name": n, "path": f"shipped:strings_moe/{n}"} for n in ("sort", "shift")],
        "rules": [{"method": "linear", "parameters": {"weight": 1.0}}],
        "router": {"harc": {"sets": ["korean"], "donors": ["shift"]}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "child"
    with pytest.raises(BadInputError, match=r"does not know .* calibration prompts of shift"):
        merge_recipe(str(tmp_path / "recipe.yaml"), str(out))
    assert not [file for file in out.rglob("*") if file.is_file()]


def test_the_merge_may_end_after_the_calibration(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routers are there: the next run has no layer to calibrate."""

    def fail(*given: Any) -> None:
        raise InterruptedHereError

    recipe, out = str(merged / "recipe.yaml"), tmp_path / "child"
    with monkeypatch.context() as patch:
        patch.setattr(single_merge.ChildWriter, "write", fail)
        with pytest.raises(InterruptedHereError):
            merge_recipe(recipe, str(out))
    assert (out / "routers" / "config.json").is_file()
    monkeypatch.setattr(calibrating, "steps_bar", fail)
    merge_recipe(recipe, str(out))
    assert digests(str(out)) == digests(str(merged / "child"))
