"""The end of a campaign: child and parents are judged, the child is examined, written and published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.breeding import bred_ancestors, rounds_for_lineage
from orchestrator.contamination import summary_of
from orchestrator.descent.attribution import attribute_written
from orchestrator.descent.family_tree import add_ancestry
from orchestrator.descent.lineage import (
    ATTRIBUTION_FILE,
    LINEAGE_FILE,
    build_lineage,
    lineage_bytes,
)
from orchestrator.ending import Ending
from orchestrator.errors import CampaignError
from orchestrator.examination import fingerprint
from orchestrator.experts.routing_of_child import measure_routing
from orchestrator.gates import engine_gates, summarize
from orchestrator.judgement import Judgement, judge
from orchestrator.ledger.state import Candidate
from orchestrator.pareto_search import FRONT_KEYS
from orchestrator.reporting.card import build_card
from orchestrator.reporting.evidence import warnings_of
from orchestrator.reporting.report import REPORT_FILE, write_report
from orchestrator.winners_curse import winners_curse
from workers.checkpoints import open_checkpoint
from workers.merging import Recipe

if TYPE_CHECKING:
    from orchestrator.campaign import Campaign


def judge_child(campaign: Campaign, candidate: Candidate) -> Judgement:
    """Child and parents on the held-out items, all of them the same."""
    campaign.watcher.stage("held-out evaluation")
    child = campaign.recipe_of(candidate)
    campaign.evaluate([child, *campaign.parent_recipes.values()], "holdout")
    results = {
        name: campaign.state.evaluation(recipe.id, "holdout")
        for name, recipe in {"child": child, **campaign.parent_recipes}.items()
    }
    for name, evaluation in results.items():
        if evaluation.failed is not None:
            raise CampaignError(f"the held-out evaluation of {name} failed: {evaluation.failed}")
    return judge(
        {name: evaluation.results for name, evaluation in results.items()},
        campaign.config.objective,
        campaign.weights,
        campaign.state.judged(recipe.id for recipe in campaign.parent_recipes.values()),
    )


def finish(campaign: Campaign, candidate: Candidate, judgement: Judgement) -> dict[str, Any]:
    """Write and publish the child, then the report; the campaign's result."""
    recipe = campaign.recipe_of(candidate)
    measured = _examine(campaign, recipe)
    routing = measure_routing(campaign, recipe)
    campaign.watcher.stage("writing the child")
    known = [record for record in campaign.ledger.since_begun() if record["kind"] == "child"]
    written = Ending(
        campaign.store,
        recipe,
        campaign.inputs.parents,
        campaign.inputs.base,
        campaign.config.health,
    ).write(
        campaign.pool,
        engine_gates(measured, campaign.config.health),
        lambda folder: campaign.record("child", recipe=recipe.id, folder=folder),
        known[-1]["folder"] if known else None,
    )
    health = summarize(written.gates, campaign.config.health, measured)
    target = campaign.store.substore(written.folder)
    campaign.watcher.stage("measuring the child")
    attribution = attribute_written(written.writer, campaign.pool)
    lineage = build_lineage(
        campaign.config,
        campaign.inputs,
        campaign.state,
        recipe,
        campaign.parent_recipes,
        candidate.genome,
        judgement,
        {"health": health} | written.weights.to_dict() | {"attribution": attribution["components"]},
    )
    lineage["search"] |= {
        "space": campaign.described,
        "ended": campaign.search.ended,
        "flat": campaign.search.flat.to_dict() if campaign.search.flat else None,
    }
    if (front := campaign.ledger.last("front")) and campaign.config.objective == "pareto":
        lineage["search"]["front"] = {key: front[key] for key in FRONT_KEYS}
    lineage["winners_curse"] = curse = _winners_curse(campaign, recipe)
    lineage["contamination"] = summary_of(campaign.contamination)
    if campaign.matching is not None:
        lineage["matching"] = campaign.matching.told
    if routing is not None:
        lineage["routing"] = routing
    number = campaign.state.round_of_recipe(recipe.id)
    through, bred = bred_ancestors(
        lineage, campaign.search.rounds, number, candidate.genome, campaign.plan, campaign.recipes
    )
    if campaign.config.breeding.rounds > 1:
        lineage["search"]["rounds"] = rounds_for_lineage(campaign.state, campaign.config, number)
    add_ancestry(lineage, campaign.inputs.parents, campaign.inputs.base, through=through, bred=bred)
    files = {
        "README.md": build_card(lineage, _cost(campaign)).encode(),
        ATTRIBUTION_FILE: lineage_bytes(attribution),
        LINEAGE_FILE: lineage_bytes(lineage),
    }
    # A record before each step that others see: a driver that was replaced stops here.
    campaign.record("publishing", recipe=recipe.id)
    written.writer.publish(files)
    open_checkpoint(target.uri)  # as any user would; raises if it is not one
    campaign.watcher.stage("writing the report")
    campaign.record(
        "rejected" if health["rejected"] else "finished",
        child=written.folder,
        recipe_id=recipe.id,
        evaluations=campaign.state.evaluated(campaign.config.search.evaluations),
        search_ended=campaign.search.ended,
        **judgement.to_dict(),
        winners_curse=curse,
        warnings=warnings_of(lineage),
        gates={gate["name"]: gate["result"] for gate in health["gates"]},
        reasons=[
            f"{gate.name}: {gate.finding} (wanted: {gate.bound})"
            for gate in written.gates
            if gate.name in health["rejected"]
        ],
        report=REPORT_FILE,
    )
    write_report(campaign.store)
    campaign.watcher.notify(campaign)
    result = campaign.ledger.result()
    assert result is not None
    return result


def _winners_curse(campaign: Campaign, recipe: Recipe) -> dict[str, Any]:
    """The child's search scores beside its held-out ones."""
    budget = campaign.config.search.evaluations
    asked = (c.recipe_id for generation in campaign.state.within_budget(budget) for c in generation)
    parents = {name: parent.id for name, parent in campaign.parent_recipes.items()}
    return winners_curse(campaign.state, recipe.id, asked, parents)


def _cost(campaign: Campaign) -> dict[str, Any] | None:
    """What it took to find the child. On the card alone: no two runs take the same time, and all else that
    belongs to a child is the same however it was found."""
    evaluated = campaign.state.evaluated(campaign.config.search.evaluations)
    return campaign.state.spending.to_dict(evaluated)


def _examine(campaign: Campaign, recipe: Recipe) -> dict[str, Any]:
    """What the live child and parents do on the calibration texts and prompts."""
    shown = fingerprint(campaign.examination)
    for record in campaign.ledger.of_kind("examined"):
        if record["recipe"] == recipe.id and record["examination"] == shown:
            found: dict[str, Any] = record["measured"]
            return found
    campaign.watcher.stage("health check")
    parents = {name: parent.to_dict() for name, parent in campaign.parent_recipes.items()}
    given = (recipe.to_dict(), parents, campaign.examination)
    ((_, measured),) = campaign.pool.each("examine", [given])
    campaign.record("examined", recipe=recipe.id, examination=shown, measured=measured)
    return dict(measured)
