"""The report: true to the ledger and the lineage, safe to open, the same each time."""

from __future__ import annotations

import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.descent.shares import weighted_shares
from orchestrator.judgement import judge
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.state import CampaignState
from orchestrator.mri.experts import keep_routing, kept_routing
from orchestrator.reporting.report import REPORT_FILE, write_report
from workers.errors import BadInputError
from workers.storage import Store, open_store

HOSTILE = """<script>alert("1")</script> & 'x' $y_2$ ]]> id="z" -->"""
COMPONENTS = ("embedding", "attention", "mlp", "norm")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def recipe_id(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def results(chance: random.Random, tasks: list[str], items: int) -> dict[str, list[dict[str, Any]]]:
    """Random answers to every task."""
    skill = chance.uniform(0.2, 0.9)
    return {
        task: [
            {
                "id": f"{number}",
                "score": float(chance.random() < skill),
                "truncated": chance.random() < 0.02,
                "unparsed": chance.random() < 0.01,
                "output": HOSTILE,
            }
            for number in range(items)
        ]
        for task in tasks
    }


def write_campaign(
    folder: Path,
    *,
    parents: tuple[str, ...] = ("wolf", "dog", "fox"),
    tasks: tuple[str, ...] = ("fetch", "howl"),
    method: str = "task_arithmetic",
    groups: tuple[str, ...] = ("attention", "mlp", "other"),
    components: tuple[str, ...] = COMPONENTS,
    layers: int = 4,
    generations: int = 3,
    population: int = 5,
    failing: tuple[int, ...] = (),
    licence: str | None = "apache-2.0",
    finish: bool = True,
) -> Store:
    """A campaign's store as a run leaves it, with made-up answers and shares."""
    chance = random.Random(7)
    store = open_store(str(folder))
    ledger = Ledger(store)
    ledger.open_epoch(1)
    budget = generations * population
    config = {
        "name": "demo",
        "objective": "worst",
        "search": {"optimizer": "cma_es", "evaluations": budget},
        "parents": [{"name": name} for name in parents],
        "seed": 5,
    }
    ledger.append("campaign", identity={}, config=config)
    ledger.append("engine", description={"engine": "transformers", "torch": "9.9", "tokens": [1]})

    def score(name: object, split: str, items: int) -> None:
        ledger.append(
            "scored",
            recipe=recipe_id(name),
            split=split,
            worker=0,
            items=results(chance, list(tasks), items),
            complete=True,
            realize_seconds=0.5,
            score_seconds=1.5,
        )

    for parent in parents:
        score(parent, "search", 40)
    if method == "slerp":
        names = [f"t.{group}" for group in groups]
    else:
        names = [f"weight.{parent}.{group}" for group in groups for parent in parents]
    for generation in range(generations):
        numbers = range(generation * population, (generation + 1) * population)
        genomes = [{name: round(chance.random(), 6) for name in names} for _ in numbers]
        ledger.append(
            "asked",
            generation=generation,
            candidates=[
                {"genome": genome, "recipe": recipe_id(number)}
                for genome, number in zip(genomes, numbers, strict=True)
            ],
        )
        for number in numbers:
            if number in failing:
                ledger.append("failed", recipe=recipe_id(number), split="search", worker=0,
                              error="broken", given_up=True)  # fmt: skip
            else:
                score(number, "search", 40)
    ledger.append("searched", evaluations=budget, reason="the budget is spent")
    state = CampaignState("worst", ledger.records)
    best = state.best(budget)
    assert best is not None
    winner, fitness = best
    ledger.append("selected", recipe=winner.recipe_id, genome=winner.genome, fitness=fitness)
    models = {"child": winner.recipe_id} | {parent: recipe_id(parent) for parent in parents}
    for model in models.values():
        ledger.append("scored", recipe=model, split="holdout", worker=0,
                      items=results(chance, list(tasks), 200), complete=True,
                      realize_seconds=0.0, score_seconds=1.0)  # fmt: skip
    state = CampaignState("worst", ledger.records)
    judgement = judge(
        {model: state.evaluation(key, "holdout").results for model, key in models.items()}, "worst"
    ).to_dict()

    def parameters() -> dict[str, Any]:
        if method == "slerp":
            return {"t": round(chance.random(), 3)}
        return {"weight": {parent: round(chance.random(), 3) for parent in parents}}

    places = [
        (component, layer)
        for component in components
        for layer in ([None] if component == "embedding" else range(layers))
    ]
    lineage = {
        "campaign": config["name"],
        "software": {"darwin": "0.1.0"},
        "parents": [
            {
                "name": parent,
                "hub": None,
                "fingerprint": recipe_id(parent),
                "license": licence,
                "unused_tensors": [],
            }
            for parent in parents
        ],
        "base": None if method == "slerp" else {"fingerprint": recipe_id("base"), "license": None},
        "recipe_id": winner.recipe_id,
        "genome": winner.genome,
        "search": {
            "optimizer": "cma_es",
            "method": method,
            "evaluations": budget,
            "objective": "worst",
            "seed": 5,
            "fitness": fitness,
            "parents_fitness": {parent: state.fitness(recipe_id(parent)) for parent in parents},
        },
        "tasks": {task: {} for task in tasks},
        **judgement,
        "tensors": [
            {
                "component": component,
                "layer": layer,
                "elements": 1000 + number,
                "method": method,
                "parameters": parameters(),
                "changed": {parent: chance.randrange(1000) for parent in parents},
            }
            for number, (component, layer) in enumerate(places)
        ],
    }
    store.write("child-1/lineage.json", json.dumps(lineage).encode())
    ledger.append("child", recipe=winner.recipe_id, folder="child-1")
    if finish:
        ledger.append(
            "finished", evaluations=budget, child="child-1", report="report.html", **judgement
        )
    return store


def lineage_of(store: Store) -> dict[str, Any]:
    lineage: dict[str, Any] = json.loads(store.read("child-1/lineage.json"))
    return lineage


class Page(HTMLParser):
    """The page's elements, checked for being well nested, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """(element, attribute, value)"""
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read_page(store: Store) -> Page:
    assert write_report(store) == f"{store.uri}/{REPORT_FILE}"
    html = store.read(REPORT_FILE).decode()
    assert html.startswith("<!DOCTYPE html>")
    return Page(html)


def test_shows_the_figures_of_ledger_and_lineage(tmp_path: Path) -> None:
    store = write_campaign(tmp_path, failing=(1, 8))
    page, lineage = read_page(store), lineage_of(store)
    text = page.text
    assert "Evaluations 15 the budget is spent" in text
    assert "Generations 3" in text
    assert "Failed attempts 2 2 given up" in text
    assert "Time evaluating 36.0 s" in text  # (3 parents + 13 candidates) x 2 s + 4 models x 1 s
    assert f"{store.uri}/child-1" in text
    assert lineage["recipe_id"] in text
    for model, scores in lineage["holdout"].items():
        row = " ".join(
            f"{s['score']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in scores.values()
        )
        unparsed = sum(s["unparsed"] for s in scores.values())
        truncated = sum(s["truncated"] for s in scores.values())
        assert (
            f"{model} {row} {lineage['holdout_fitness'][model]:.3f} {unparsed} {truncated}" in text
        )
    for c in lineage["comparisons"]:
        assert (
            f"{c['parent']} {c['task']} {c['child_only']} {c['parent_only']} {c['p_value']:.2g}"
            in text
        )
    for parent, fitness in lineage["search"]["parents_fitness"].items():
        assert f"{parent} {fitness:.3f}" in text
    for value in lineage["genome"].values():
        assert f"{value:.3f}" in text
    for parent in lineage["parents"]:
        assert f"{parent['name']} apache-2.0 {parent['fingerprint']}" in text
    assert "torch 9.9" in text
    assert "optimizer: cma_es" in text


@pytest.mark.parametrize(("beaten", "words"), [
    (["wolf", "dog", "fox"], "beats every parent"),
    (["dog"], "beats dog (p < 0.05), but not wolf and fox"),
    ([], "beats none of its parents"),
])  # fmt: skip
def test_verdict(tmp_path: Path, beaten: list[str], words: str) -> None:
    store = write_campaign(tmp_path)
    store.write("child-1/lineage.json", json.dumps(lineage_of(store) | {"beaten": beaten}).encode())
    assert words in read_page(store).text


@pytest.mark.parametrize("shape", [
    {"parents": ("a", "b"), "tasks": ("only",), "method": "slerp"},
    {"parents": ("a", "b"), "method": "linear", "generations": 1, "population": 1},
    {"layers": 64, "groups": tuple(f"group{n}" for n in range(12)), "parents": tuple("abcdefghi"),
     "tasks": tuple(f"task.{n}" for n in range(9))},
    {"components": ("embedding",), "layers": 0},
])  # fmt: skip
def test_campaigns_of_all_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    page = read_page(write_campaign(tmp_path, **shape))
    assert [tag for tag, name, _ in page.attributes if name == "viewbox"] == ["svg"] * 5


def test_the_experts_of_the_parents_are_shown(tmp_path: Path) -> None:
    """What the campaign has kept of its scan, shortened; a parent that was bred in is none of the child's."""
    store = write_campaign(tmp_path)

    def routing(frequent: int) -> dict[str, Any]:
        return {
            "tokens": 20, "per_token": 2, "choices": [20 + frequent, 10, 10 - frequent, 0],
            "weights": [0.5] * 4, "merit": [1 / 3] * 4, "load_entropy": 1.5, "token_entropy": 1.25,
            "overlap": {"dog": 0.75},
        }  # fmt: skip

    rows = [{"layer": layer, "component": "mlp", "routing": routing(layer)} for layer in (1, 2)]
    probed = {name: {"set": rows} for name in ("wolf", "cat")}
    keep_routing({"probe": {"parents": probed}}, store)
    page = read_page(store)
    assert "Experts: merit" in page.text
    assert "routers of wolf choose 2 of 4 experts; load entropy" in page.text
    assert "dead experts of cat (chosen less than 5% as often as at an even load): 2" in page.text
    assert (
        "of the experts that cat chooses, the routers of others would choose, too: dog 75%"
        in page.text
    )
    assert [tag for tag, name, _ in page.attributes if name == "viewbox"] == ["svg"] * 8
    assert kept_routing(store)["wolf"][2]["merit"] == [0.3333] * 4


def test_the_ancestors_of_all_generations_are_shown(tmp_path: Path) -> None:
    """A grandparent through two parents, one of which was bred and never written; all names hostile."""
    store = write_campaign(tmp_path)
    elements = {"mlp": 3, "norm": 1}

    def descend(node: str, role: str, share: float) -> dict[str, Any]:
        return {
            "node": node,
            "name": HOSTILE,
            "role": role,
            "shares": dict.fromkeys(elements, share),
        }

    def one(**content: Any) -> dict[str, Any]:
        return {"name": HOSTILE, "elements": elements, "based_on": "recipe"} | content

    old = descend("old", "father", 0.25)
    ancestry = {
        "child": one(parents=[descend("pup", "father", 0.5), descend("old", "mother", 0.5)],
                     through=[descend("recipe:1", "bred", 1.0)]),
        "ancestors": {
            "recipe:1": one(recipe_id="1", parents=[descend("pup", "father", 1.0)]),
            "pup": one(fingerprint="pup", license=HOSTILE, parents=[old, descend("new", "mother", 0.75)]),
            "old": one(fingerprint="old", license="gpl-3.0"),
            "new": one(fingerprint="new"),
        },
    }  # fmt: skip
    lineage = lineage_of(store) | {"ancestry": ancestry}
    store.write("child-1/lineage.json", json.dumps(lineage).encode())
    page = read_page(store)
    assert [tag for tag, name, _ in page.attributes if name == "viewbox"] == ["svg"] * 6
    assert not any(tag == "script" or name.startswith("on") for tag, name, _ in page.attributes)
    assert f"{HOSTILE} 62.5 % 62.5 % 62.5 % gpl-3.0" in page.text  # 1/2 + 1/2 x 1/4
    assert f"{HOSTILE} 37.5 % 37.5 % 37.5 % not declared" in page.text
    assert f"gpl-3.0 ({HOSTILE}); not declared ({HOSTILE})." in page.text


def test_names_from_data_are_escaped(tmp_path: Path) -> None:
    store = write_campaign(
        tmp_path, tasks=(HOSTILE, "plain"), components=(HOSTILE, "mlp"), licence=HOSTILE
    )
    page = read_page(store)
    assert page.text.count(HOSTILE) >= 5
    assert not any(tag == "script" or name.startswith("on") for tag, name, _ in page.attributes)


def test_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = read_page(write_campaign(tmp_path))
    html = (tmp_path / REPORT_FILE).read_text()
    links = [value for _, name, value in page.attributes if name.endswith(("src", "href"))]
    links += re.findall(r"url\(([^)]*)\)", html)
    assert set(links) - {"child-1/lineage.json"}
    assert all(link == "child-1/lineage.json" or link.startswith("#") for link in links)
    assert "@import" not in html
    assert "http" not in html
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in links if link.startswith("#")} == set(ids)


def part(component: str, layer: int | None, shares: dict[str, float] | None) -> dict[str, Any]:
    """An attribution's entry; no shares: the parents are alike there."""
    coefficients = shares or {}
    return {
        "component": component, "layer": layer, "elements": 10, "tensors": 3, "shares": shares,
        "coefficients": coefficients, "explained": 0.876 if shares else None, "uniform": None,
        "residual": 0.0, "undetermined": [], "identical": {"wolf": 2, "dog": 0},
    }  # fmt: skip


def write_attribution(store: Store, base: bool = True) -> None:
    shares = {"wolf": 0.111, "dog": 0.639} | ({"base": 0.25} if base else {"fox": 0.25})
    attribution = {
        "base": base,
        "components": [part("mlp", None, shares), part("norm", None, None)],
        "cells": [part("mlp", 0, shares), part("norm", None, None)],
    }
    store.write("child-1/attribution.json", json.dumps(attribution).encode())


@pytest.mark.parametrize("base", [True, False])
def test_shows_what_was_measured_where_there_is_an_attribution(base: bool, tmp_path: Path) -> None:
    store = write_campaign(tmp_path)
    before = read_page(store).text
    assert "Measured" not in before
    write_attribution(store, base)
    page = read_page(store)
    assert [tag for tag, name, _ in page.attributes if name == "viewbox"] == ["svg"] * 5
    assert "whose coefficients sum to 1" in page.text
    assert "magnitude of its weight" not in page.text
    intended = weighted_shares(lineage_of(store)["tensors"], ["wolf", "dog", "fox"], "component")
    wolf, dog, fox = (f"{100 * intended['mlp',][name]:.0f} %" for name in ("wolf", "dog", "fox"))
    last = f"0.000 {fox} 0.250" if base else f"0.250 {fox}"
    assert f"mlp 0.111 {wolf} 0.639 {dog} {last} 87.6 % 3 2 wolf" in page.text
    assert "norm alike" in page.text
    for drawn in ("11%", "64%", "parents alike"):  # the bars
        assert drawn in page.text
    assert ("grey: the base" in page.text) == base


def test_parents_that_are_alike_everywhere(tmp_path: Path) -> None:
    store = write_campaign(tmp_path)
    alike = [part("mlp", 0, None)]
    store.write(
        "child-1/attribution.json",
        json.dumps({"base": False, "components": alike, "cells": alike}).encode(),
    )
    assert "parents alike" in read_page(store).text


def test_same_store_same_bytes(tmp_path: Path) -> None:
    store = write_campaign(tmp_path)
    write_report(store)
    first = store.read(REPORT_FILE)
    write_report(store)
    assert store.read(REPORT_FILE) == first


def test_unfinished_campaign(tmp_path: Path) -> None:
    store = write_campaign(tmp_path, finish=False)
    with pytest.raises(BadInputError, match="darwin run"):
        write_report(store)
    with pytest.raises(BadInputError, match="darwin run"):
        write_report(open_store(str(tmp_path / "empty")))


def test_larger_budget_is_unfinished(tmp_path: Path) -> None:
    store = write_campaign(tmp_path)
    ledger = Ledger(store)
    begun = ledger.last("campaign")
    assert begun is not None
    config = begun["config"] | {"search": {"optimizer": "cma_es", "evaluations": 100}}
    ledger.open_epoch(2)
    ledger.append("campaign", identity={}, config=config)
    ledger.append("asked", generation=3, candidates=[{"genome": {}, "recipe": recipe_id("new")}])
    ledger.append(
        "failed", recipe=recipe_id("new"), split="search", worker=0, error="broken", given_up=True
    )
    with pytest.raises(BadInputError, match="darwin run"):
        write_report(store)


def test_shares_are_weighted_by_elements() -> None:
    tensors = [
        {"component": component, "elements": elements, "method": method, "parameters": parameters}
        for component, elements, method, parameters in (
            ("mlp", 300, "linear", {"weight": {"a": 1.0, "b": -1.0}}),
            ("mlp", 100, "passthrough", {"source": "a"}),
            ("norm", 10, "slerp", {"t": 0.25}),
        )
    ]
    assert weighted_shares(tensors, ["a", "b"], "component") == {
        ("mlp",): {"a": 0.625, "b": 0.375},
        ("norm",): {"a": 0.75, "b": 0.25},
    }


def test_the_health_check_is_shown_where_there_was_one(tmp_path: Path) -> None:
    store = write_campaign(tmp_path)
    assert "Health check" not in read_page(store).text
    lineage = lineage_of(store)
    finding = f"loops after 9 of 16 prompts: {HOSTILE}"
    gates = [
        {"name": "finite", "result": "passed", "finding": "all", "bound": "none", "warnings": []},
        {
            "name": "repetition",
            "result": "failed",
            "finding": finding,
            "bound": "25 %",
            "warnings": [],
        },
    ]
    lineage["health"] = {"rejected": ["repetition"], "allowed": [], "gates": gates, "measured": {}}
    store.write("child-1/lineage.json", json.dumps(lineage).encode())
    page = read_page(store)
    assert "Rejected: this child did not pass the gates repetition" in page.text
    assert finding in page.text
    assert ("p", "class", "verdict none") in page.attributes
