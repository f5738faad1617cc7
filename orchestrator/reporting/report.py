"""The report: what a finished campaign found, as one HTML page that opens offline.

Everything in it comes from the campaign's store: the ledger tells of the search, the child's lineage of
the rest. The same store gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml

from orchestrator.descent.ancestry import parse_ancestry
from orchestrator.descent.lineage import ATTRIBUTION_FILE, LINEAGE_FILE
from orchestrator.descent.shares import measured_shares, weighted_shares
from orchestrator.experts.matching import notes_on_matching
from orchestrator.experts.routing_table import MEANING, routing_notes, routing_table
from orchestrator.judgement import SIGNIFICANCE
from orchestrator.ledger.ledger import Ledger, Record
from orchestrator.ledger.state import CampaignState, Candidate, read_campaign
from orchestrator.mri.dead_experts import dead_expert_notes, dead_of
from orchestrator.mri.experts import expert_notes, kept_routing, summarize_experts
from orchestrator.mri.prescribing import notes_on_search
from orchestrator.objectives import objective_words, scalar_name
from orchestrator.reporting.ancestry_view import founders, licences
from orchestrator.reporting.card import (
    BRED_SHARES,
    component_changes,
    reservations,
    verdict,
)
from orchestrator.reporting.cost import cost_section
from orchestrator.reporting.evidence import (
    better_of,
    category_tables,
    claim_rows,
    claims_note,
    comparison_rows,
    overlap_note,
    overlap_rows,
    shrinkage_note,
    shrinkage_rows,
    tests_note,
    warnings_of,
)
from orchestrator.reporting.expert_map import expert_chart, expert_map, expert_rows
from orchestrator.reporting.front import draw_front, front_note
from orchestrator.reporting.items import write_campaign_items
from orchestrator.reporting.making import breeding, racing, what_was_searched
from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError, Store
from workers.storage.documents import damage_named, read_document

REPORT_FILE = "report.html"
TEMPLATE_FILE = "report.html.jinja"

ALL_PARENTS = "all parents"
"""Heads the genes that weigh no single parent."""


def write_report(store: Store) -> str:
    """Write the page into the campaign's store, and beside it the results of all items; its location.

    Raises `BadInputError` if the campaign is not finished, or what it has left is damaged.
    """
    ledger, state = read_campaign(store)
    page = _page(ledger, state)
    with damage_named(f"{store.uri}: its ledger"):
        write_campaign_items(store, ledger, state)
    store.write(REPORT_FILE, page.encode())
    return f"{store.uri}/{REPORT_FILE}"


def build_report(store: Store) -> str:
    """The page of the campaign in `store`. Raises `BadInputError` if it is not finished."""
    return _page(*read_campaign(store))


def _page(ledger: Ledger, state: CampaignState) -> str:
    store = ledger.store
    begun, child = ledger.last("campaign"), ledger.last("child")
    if begun is None or child is None or ledger.result() is None:
        raise _unfinished(store)
    target = store.substore(child["folder"])
    lineage = read_document(target, LINEAGE_FILE)
    with damage_named(f"{target.uri}/{LINEAGE_FILE}, or {store.uri}: its ledger"):
        return _render(ledger, state, begun, child["folder"], target, lineage)


def _render(
    ledger: Ledger,
    state: CampaignState,
    begun: Record,
    folder: str,
    target: Store,
    lineage: dict[str, Any],
) -> str:
    from jinja2 import Environment, StrictUndefined

    from orchestrator.reporting import charts
    from orchestrator.reporting.ancestry_chart import ancestry_chart

    store, config = ledger.store, begun["config"]
    state.judge_by(config["objective"], lineage["search"].get("weights"))
    budget = config["search"]["evaluations"]
    generations = _evaluated(state, budget)
    parents = [parent["name"] for parent in lineage["parents"]]
    engine, searched = ledger.last("engine"), ledger.last("searched")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = _duration
    template = environment.from_string(
        files(__package__).joinpath(TEMPLATE_FILE).read_text("utf-8")
    )
    ancestry = parse_ancestry(lineage["ancestry"]) if "ancestry" in lineage else None
    intended = weighted_shares(lineage["tensors"], parents, "component")
    attribution = _attribution(target)
    if attribution is None:
        by_component = intended
        by_layer = weighted_shares(lineage["tensors"], parents, "component", "layer")
    else:
        by_component = measured_shares(attribution["components"], parents, "component")
        by_layer = measured_shares(attribution["cells"], parents, "component", "layer")
    experts = expert_map(lineage)
    return template.render(
        lineage=lineage,
        verdict=verdict(lineage),
        reservations=reservations(lineage),
        what_was_searched=what_was_searched(lineage["search"]),
        breeding=breeding(lineage),
        aim=objective_words(lineage["search"]),
        racing=racing(lineage),
        bred_shares=BRED_SHARES,
        parents=parents,
        colours=charts.parent_colours(parents),
        best_parent=max(parents, key=lambda name: lineage["holdout_fitness"][name]),
        best_scores={
            task: max(scores[task]["score"] for scores in lineage["holdout"].values())
            for task in lineage["tasks"]
        },
        evidence=_evidence(lineage, parents),
        generations=None if state.is_steady else len(generations),
        fitness_name=scalar_name(lineage["search"]["objective"]),
        front_note=front_note(lineage["search"]["front"]) if "front" in lineage["search"] else None,
        failures=state.failures,
        given_up=sum(evaluation.failed is not None for evaluation in state.evaluations.values()),
        seconds=sum(evaluation.seconds for evaluation in state.evaluations.values()),
        cost=cost_section(ledger, state),
        reason=searched["reason"] if searched else None,
        notes=[*notes_on_search(lineage["search"]), *notes_on_matching(lineage)],
        child_uri=target.uri,
        child_folder=folder,
        base_remains=any(0 < sum(shares.values()) < 0.999 for shares in by_component.values()),
        largest_share=max(
            (share for shares in by_layer.values() for share in shares.values()), default=0.0
        ),
        attribution=attribution,
        intended={component: shares for (component,), shares in intended.items()},
        changes=component_changes(lineage),
        experts=expert_rows(experts) if experts else [],
        parents_experts=_experts(store, parents),
        ancestry=ancestry,
        routing=_routing(lineage.get("routing")),
        founders=founders(ancestry) if ancestry else [],
        licences=licences(ancestry) if ancestry else [],
        significant=SIGNIFICANCE,
        configuration=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        software=lineage["software"] | (_scalars(engine["description"]) if engine else {}),
        charts=_draw_search(lineage, state, generations)
        | {
            "front": draw_front(
                lineage,
                state,
                [candidate for asked in generations for candidate in asked],
            ),
            "bars": charts.share_bars(by_component, parents),
            "maps": charts.share_maps(by_layer, parents),
            "experts": expert_chart(experts) if experts else None,
            "ancestry": ancestry_chart(ancestry, parents) if ancestry else None,
        },
    )


def _evidence(lineage: dict[str, Any], parents: list[str]) -> dict[str, Any]:
    """What the page says of the held-out results, in words and tables."""
    heads, *comparisons = comparison_rows(lineage)
    return {
        "warnings": warnings_of(lineage),
        "tests_note": tests_note(lineage).replace("`", ""),
        "heads": heads,
        "comparisons": list(zip(comparisons, map(better_of, lineage["comparisons"]), strict=True)),
        "claims": claim_rows(lineage),
        "claims_note": claims_note(lineage),
        "shrinkage": shrinkage_rows(lineage),
        "shrinkage_note": shrinkage_note(lineage),
        "categories": category_tables(lineage, ["child", *parents]),
        "overlaps": overlap_rows(lineage),
        "overlap_note": overlap_note(lineage),
    }


def _routing(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of how experts are chosen; None where nothing was measured."""
    if record is None or "not_compared" in record:
        return None
    return {
        "table": routing_table(record),
        "meaning": MEANING.replace("*", ""),
        "notes": routing_notes(record),
    }


def _attribution(child: Store) -> dict[str, Any] | None:
    """What was measured of the child; None for one from before that was done."""
    try:
        found = read_document(child, ATTRIBUTION_FILE)
    except ObjectNotFoundError:
        return None
    return found


def _experts(store: Store, parents: list[str]) -> dict[str, Any]:
    """What the campaign's scan found of its parents' experts, in words and pictures; none of dense ones."""
    from orchestrator.mri.expert_charts import expert_figures

    found = kept_routing(store)
    names = [*parents, *(name for name in found if name not in parents)]
    return {
        "notes": [
            *expert_notes(summarize_experts(found)),
            *dead_expert_notes(dead_of(found)),
        ],
        "figures": expert_figures(found, names),
    }


def _unfinished(store: Store) -> BadInputError:
    return BadInputError(
        f"{store.uri}: this campaign is not finished, so there is nothing to report yet; run "
        "`darwin run` with its campaign file again: it continues where it stopped and writes the report"
    )


def _evaluated(state: CampaignState, budget: int) -> list[list[Candidate]]:
    """The candidates that were evaluated, per generation, each where it was first asked for."""
    seen: set[str] = set()
    generations = []
    for asked in state.within_budget(budget):
        new = {c.recipe_id: c for c in reversed(asked) if c.recipe_id not in seen}
        seen |= new.keys()
        complete = [
            candidate
            for candidate in reversed(new.values())
            if state.evaluation(candidate.recipe_id, "search").complete
            or candidate.recipe_id in state.races.decided
        ]
        if complete:
            generations.append(complete)
    if state.is_steady:
        return [[candidate for asked in generations for candidate in asked]]
    return generations


def _estimates(state: CampaignState, candidates: Sequence[Candidate]) -> dict[int, float]:
    """Number of a candidate, from 1 -> what its last race has estimated, if it has no fitness."""
    return {
        number: estimate
        for number, candidate in enumerate(candidates, 1)
        if state.fitness(candidate.recipe_id) is None
        and state.evaluation(candidate.recipe_id, "search").failed is None
        and (estimate := state.races.estimate(candidate.recipe_id)) is not None
    }


def _draw_search(
    lineage: dict[str, Any], state: CampaignState, generations: list[list[Candidate]]
) -> dict[str, Any]:
    from orchestrator.reporting import charts

    parents = [parent["name"] for parent in lineage["parents"]]
    search = lineage["search"]
    candidates = [candidate for generation in generations for candidate in generation]
    # Of a child that was bred in a later round the genes weigh those that it was bred from.
    bred = [
        descent["name"]
        for descent in lineage.get("ancestry", {}).get("child", {}).get("through", ())
    ]
    return {
        "fitness": charts.fitness_chart(
            [[state.fitness(candidate.recipe_id) for candidate in asked] for asked in generations],
            winner=1 + [c.recipe_id for c in candidates].index(lineage["recipe_id"]),
            parents={name: search["parents_fitness"][name] for name in parents},
            axis=f"fitness ({scalar_name(search['objective'])} of the tasks)",
            estimates=_estimates(state, candidates),
        ),
        "holdout": charts.holdout_chart(lineage["holdout"], parents, list(lineage["tasks"])),
        "genome": charts.genome_chart(
            _gene_values(lineage["genome"], candidates, bred or parents), bred or parents
        )
        if lineage["genome"]
        else None,
    }


def _gene_values(
    genome: dict[str, float], candidates: list[Candidate], parents: list[str]
) -> list[Any]:
    """The winner's genes, each with its parent and with what the other candidates had.

    A gene of a parent is named `parameter.parent...`; the store does not tell the bounds, so the range
    that the candidates took stands for them.
    """
    from orchestrator.reporting.charts import GeneValues

    split = {name: name.split(".") for name in genome}
    shared = {parts[0] for parts in split.values() if not set(parts[1:2]) & set(parents)}
    genes = []
    for name, parts in split.items():
        owned = parts[0] not in shared
        row = ".".join([parts[0], *parts[2:]]) if owned else name
        # Other rounds of breeding have other genes.
        values = [candidate.genome[name] for candidate in candidates if name in candidate.genome]
        genes.append(GeneValues(row, parts[1] if owned else ALL_PARENTS, genome[name], values))
    return genes


def _scalars(description: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in description.items() if not isinstance(value, list | dict)}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
