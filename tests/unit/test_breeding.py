"""Rounds of breeding: their budgets, their survivors, and what is refused before anything is written."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.breeding import begin_round, bred_ancestors, check_breeding, limit_of, seed_of
from orchestrator.campaign import Campaign
from orchestrator.config import load_config
from orchestrator.inputs import open_inputs
from orchestrator.ledger.ledger import Record
from orchestrator.ledger.state import CampaignState, Candidate
from tests.campaigns import write_campaign
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.plan import Plan

PARENTS = ("reverse", "sort", "shift")


def bred_config(folder: Path, **changes: Any) -> Any:
    genome = {"space": "components", "method": "task_arithmetic"}
    breeding = {"rounds": 3, "survivors": 2}
    return load_config(
        str(write_campaign(folder, **{"genome": genome, "breeding": breeding, **changes}))
    )


class Silent:
    def begin(self, campaign: Campaign) -> None: ...
    def stage(self, name: str) -> None: ...
    def notify(self, campaign: Campaign) -> None: ...
    def happened(self, campaign: Campaign, event: Any) -> None: ...


def asked(number: int, *recipes: str) -> Record:
    candidates = [{"genome": {}, "recipe": recipe} for recipe in recipes]
    return {"kind": "asked", "epoch": 1, "generation": 0, "round": number, "candidates": candidates}


def began(number: int, limit: int) -> Record:
    return {"kind": "round", "epoch": 1, "round": number, "limit": limit, "parents": []}


def scored(recipe: str, fitness: float) -> Record:
    return {
        "kind": "scored", "epoch": 1, "recipe": recipe, "split": "search", "complete": True,
        "items": {"one": [{"id": "1", "score": fitness}]}, "realize_seconds": 0.0, "score_seconds": 0.0,
    }  # fmt: skip


def test_the_budget_is_shared_evenly_and_exactly(tmp_path: Path) -> None:
    for rounds, evaluations in ((3, 14), (4, 100), (7, 15)):
        config = bred_config(
            tmp_path,
            breeding={"rounds": rounds, "survivors": 2},
            search={"evaluations": evaluations},
        )
        limits = [limit_of(config, number) for number in range(rounds + 1)]
        spans = [after - before for before, after in itertools.pairwise(limits)]
        assert (limits[0], limits[-1]) == (0, evaluations)
        assert max(spans) - min(spans) <= 1


def test_each_round_has_a_seed_of_its_own(tmp_path: Path) -> None:
    config = bred_config(tmp_path, seed=7)
    assert seed_of(config, 1) == 7  # as without breeding
    seeds = {seed_of(config, number) for number in range(1, 50)}
    assert len(seeds) == 49
    config.seed = 8
    assert seed_of(config, 2) not in seeds


def test_a_round_pays_no_more_than_its_limit() -> None:
    state = CampaignState(
        "mean",
        [began(1, 3), asked(1, "a", "b"), asked(1, "c", "d"), began(2, 6), asked(2, "b", "e", "d"),
         asked(2, "f", "g"), *(scored(name, n / 10) for n, name in enumerate("abcdefg"))],
    )  # fmt: skip
    paid = [[c.recipe_id for c in generation] for generation in state.within_budget(6)]
    # `d` is over the first round's limit, but within the second's; `b` was paid for before.
    assert paid == [["a", "b"], ["c"], ["b", "e", "d"], ["f"]]
    assert [state.generations_through(number) for number in range(3)] == [0, 2, 4]
    assert [c.recipe_id for c in state.best_of_round(1, 2, 6)] == ["c", "b"]
    assert [c.recipe_id for c in state.best_of_round(2, 9, 6)] == ["f", "e", "d", "b"]
    best = state.best(6)
    assert best is not None and best[0].recipe_id == "f"
    assert [state.round_of_recipe(name) for name in "abe"] == [1, 1, 2]


def test_of_equal_children_the_first_survive_and_failed_ones_do_not() -> None:
    failed = {"kind": "failed", "epoch": 1, "recipe": "b", "split": "search", "given_up": True,
              "error": "broken"}  # fmt: skip
    state = CampaignState(
        "mean", [asked(1, "a", "b", "c", "a", "d"), failed, scored("d", 0.5), scored("c", 0.5)]
    )
    assert [c.recipe_id for c in state.best_of_round(1, 2, 9)] == ["c", "d"]


def test_a_campaign_without_breeding_is_what_it_was(tmp_path: Path) -> None:
    """Its identity has no word of breeding, so that a store of an older version can be resumed."""
    config = bred_config(tmp_path, breeding={"rounds": 1, "survivors": 5})
    assert "breeding" not in open_inputs(config).identity(config)
    config.breeding.rounds = 2
    assert open_inputs(config).identity(config)["breeding"] == {"rounds": 2, "survivors": 5}


def test_the_second_rounds_genes_weigh_the_survivors(tmp_path: Path) -> None:
    """Its recipes are over the campaign's parents all the same, with the factors by hand."""
    campaign = Campaign(bred_config(tmp_path), Silent())
    first = [
        campaign.space.decode(dict.fromkeys(campaign.space.point(campaign.space.start), value))
        for value in (0.2, 0.5)
    ]
    survivors = [(Candidate({"weight": 0.0}, recipe.id), recipe) for recipe in first]
    second = begin_round(campaign.config, campaign.inputs, campaign.plan, 2, survivors)
    genome = second.space.point(second.space.start)
    assert {name.split(".")[1] for name in genome} == {"round1-1", "round1-2"}
    genome = {name: 0.5 if "round1-1" in name else 1.0 for name in genome}
    recipe = second.space.decode(genome)
    assert [parent.name for parent in recipe.parents] == list(PARENTS)
    # base + 0.5 * (0.2 * deltas) + 1.0 * (0.5 * deltas)
    weights = [rule.parameters["weight"] for rule in recipe.rules]
    assert weights == [dict.fromkeys(PARENTS, 0.6)]
    for component, shares in second.space.shares(genome).items():
        assert shares == pytest.approx({"round1-1": 0.1 / 0.6, "round1-2": 0.5 / 0.6}), component


def test_who_was_bred_and_never_written_is_remembered(tmp_path: Path) -> None:
    """Two rounds deep: the child, who it was bred from, who these were, and the parents of all."""
    campaign = Campaign(bred_config(tmp_path), Silent())
    inputs, plan, recipes, rounds = campaign.inputs, campaign.plan, {}, {}
    genome = campaign.space.point(campaign.space.start)
    space: Any = campaign.space
    for number in (2, 3):
        survivors = []
        for value in (0.3, 0.6):
            own = dict.fromkeys(genome, value)
            recipe: Recipe = space.decode(own)
            recipes[recipe.id] = recipe
            survivors.append((Candidate(own, recipe.id), recipe))
        rounds[number] = begin_round(campaign.config, inputs, plan, number, survivors)
        space = rounds[number].space
        genome = space.point(space.start)
    lineage: dict[str, Any] = {
        "campaign": "small",
        "parents": [{"name": r.name, "fingerprint": r.fingerprint} for r in inputs.references],
        "base": None,
    }
    through, bred = bred_ancestors(lineage, rounds, 3, genome, plan, recipes)
    assert [descent.name for descent in through] == ["round2-1", "round2-2"]
    assert sorted(one.name for one in bred.values()) == [
        "round1-1", "round1-2", "round2-1", "round2-2",
    ]  # fmt: skip
    for descent in through:
        # Their genes are 0.3 and 0.6 of everything, and so are the shares in a child of equal genes.
        share = 1 / 3 if descent.name == "round2-1" else 2 / 3
        assert descent.shares["mlp"] == pytest.approx(share)
        grand = bred[descent.node].through
        assert [one.name for one in grand] == ["round1-1", "round1-2"]
        parents = bred[descent.node].parents
        assert [one.shares["mlp"] for one in parents] == pytest.approx([1 / 3] * 3)
    assert bred_ancestors(lineage, rounds, 1, genome, plan, recipes) == ((), {})


@pytest.mark.parametrize(("changes", "words"), [
    ({"genome": {"space": "components", "method": "dare_ties"}},
     "breeding.rounds.*dare_ties does not compose.*linear, passthrough, task_arithmetic"),
    ({"breeding": {"rounds": 0}}, "breeding.rounds: 0 must be 1 or more"),
    ({"breeding": {"rounds": 2, "survivors": 1}}, "breeding.survivors: 1 must be 2 or more"),
    ({"breeding": {"rounds": 8, "survivors": 2}}, "8 rounds of so many evaluations"),
    ({"breeding": {"broods": 8}}, "broods"),
])  # fmt: skip
def test_what_cannot_breed_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInputError, match=words):
        Campaign(bred_config(tmp_path, **changes), Silent())
    assert not (tmp_path / "store").exists()


def test_a_check_names_what_a_second_round_could_not_do(tmp_path: Path) -> None:
    config = bred_config(tmp_path)
    inputs = open_inputs(config)
    plan = Plan(inputs.maps, inputs.base_map)
    stacked = Recipe(inputs.references, (), inputs.base_reference, dtype="F32")
    with pytest.raises(
        BadInputError, match=r"second round cannot be: round1-1: changes its father"
    ):
        check_breeding(config, inputs, plan, stacked)
    assert yaml.safe_load((tmp_path / "campaign.yaml").read_text())["breeding"]["rounds"] == 3
