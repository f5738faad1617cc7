"""The recipes that the documentation shows are recipes."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from orchestrator.child_writer import ChildWriter
from orchestrator.cli import app
from orchestrator.config import GATES, HealthConfig, load_config
from orchestrator.genomes.build import build_space
from orchestrator.inputs import open_inputs
from orchestrator.jobs.driver_config import DriverConfig
from orchestrator.mri.scan import scan_parents
from orchestrator.pool.calls import open_calls
from orchestrator.recipe_file import load_recipe_file
from tests.campaigns import write_campaign
from tests.families import write_family
from workers.checkpoints import open_checkpoint
from workers.evaluation import load_task
from workers.evaluation.answers import COMPARISONS, RULES
from workers.evaluation.tasks.loading import SOURCES
from workers.merging import METHODS
from workers.storage.folder import FolderStore

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    (file.name, number, text)
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", file.read_text(), re.DOTALL))
    if "rules:" in text or "merge_method:" in text
]


@pytest.mark.parametrize(("file", "number", "text"), EXAMPLES)
def test_a_recipe_of_the_documentation_can_be_merged(
    file: str, number: int, text: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    loaded = load_recipe_file(str(tmp_path / "recipe.yaml"))
    target = FolderStore(tmp_path / "child")
    writer = ChildWriter.create(loaded.recipe, loaded.parents, loaded.base, target)
    assert {way.method.name for way in writer.assigned.values()} - {"passthrough"}


@pytest.mark.parametrize(
    "text",
    [
        text
        for text in re.findall(
            r"```yaml\n(.*?)```", (ROOT / "docs" / "campaigns.md").read_text(), re.DOTALL
        )
        if "genome:" in text
    ],
)
def test_a_genome_of_the_documentation_can_be_searched(text: str, tmp_path: Path) -> None:
    given = yaml.safe_load(text)
    places = [f"shipped:strings/{skill}" for skill in ("base", "sort", "shift")]
    if given["genome"]["space"] == "experts":
        places = list(map(str, write_family(tmp_path, "qwen3_moe")))
    base, *parents = places
    given["parents"] = [{"name": f"parent{n}", "path": place} for n, place in enumerate(parents)]
    file = write_campaign(tmp_path, **({"base": base} | given))
    config = load_config(str(file))
    inputs = open_inputs(config)
    space = build_space(
        config.genome, inputs.father_map, inputs.references, inputs.base_reference, 0,
        config.scan.scans, probes=config.scan.probe,
    )  # fmt: skip
    assert space.genes


@pytest.mark.parametrize(
    "text",
    [
        text
        for file in ("cluster.md", "evaluation.md")
        for text in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / file).read_text(), re.DOTALL)
        if "workers:" in text
    ],
)
def test_workers_of_the_documentation_can_be_asked_for(text: str, tmp_path: Path) -> None:
    given = yaml.safe_load(text)
    workers = load_config(str(write_campaign(tmp_path, **given))).workers
    pools = given["workers"].get("pools", [])
    assert workers.total == given["workers"]["count"] + sum(pool["count"] for pool in pools)


def test_there_are_recipes_in_the_documentation() -> None:
    assert {file for file, _, _ in EXAMPLES} == {"README.md", "recipes.md"}


def test_every_method_is_in_the_table() -> None:
    table = (ROOT / "docs" / "methods.md").read_text()
    assert {name for name in METHODS if f"| `{name}` |" not in table} == set()


def test_a_scan_is_as_documented() -> None:
    text = (ROOT / "docs" / "diagnostics.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    wanted = json.loads(example)
    parents = {n: open_checkpoint(f"shipped:strings/{n}") for n in ("reverse", "sort")}
    named = dict(zip(("father", "mother"), parents.values(), strict=True))
    with open_calls(named, base := open_checkpoint("shipped:strings/base"), None, None) as calls:
        found = scan_parents(named, base, calls, None)
    assert list(found) == list(wanted)
    row = next(row for row in found["static"] if row["tensor"] == wanted["static"][0]["tensor"])
    assert list(row) == list(wanted["static"][0])
    for part in ("of", "between"):
        documented = wanted["static"][0][part]
        assert list(row[part]) == list(documented)
        (key, *_) = documented
        assert row[part][key] == pytest.approx(documented[key], rel=1e-3)
    for one, two in zip(found["parents"], wanted["parents"], strict=True):
        assert one["fingerprint"].startswith(two["fingerprint"].removesuffix("..."))


def test_every_bound_of_the_health_check_is_told_with_its_default() -> None:
    page = (ROOT / "docs" / "campaigns.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 5]
    told = {row.split("`")[1]: row for row in rows}
    assert set(GATES) <= told.keys()
    for key in fields(HealthConfig):
        assert f"health.{key.name}" in page, key.name
        if isinstance(key.default, float):
            (row,) = [row for row in told.values() if f"`health.{key.name}`" in row]
            keys, defaults = (cell.split(",") for cell in row.split("|")[3:5])
            place = [cell.strip() for cell in keys].index(f"`health.{key.name}`")
            assert float(defaults[place]) == key.default
        elif isinstance(key.default, int):
            assert f"`health.{key.name}` ({key.default})" in page


def test_the_driver_of_a_job_is_told_with_its_defaults() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "jobs.md").read_text().splitlines()]
    told = {row[1].strip(): row[2].strip() for row in rows if row[1:] and "driver." in row[1]}
    own = DriverConfig()
    assert told == {
        f"`driver.{key.name}`": "none"
        if (value := getattr(own, key.name)) is None
        else f"`{value}`"
        for key in fields(own)
    }


def test_commands_of_the_documentation_are_commands() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    code = [
        block
        for page in pages
        for block in re.findall(
            r"```console\n(.*?)```|`(darwin [^`\n]*)`", page.read_text(), re.DOTALL
        )
    ]
    named = {
        name
        for text in code
        for name in re.findall(r"^(?:\$ )?darwin ([a-z]+)", "\n".join(text), re.MULTILINE)
    }
    assert {"submit", "list", "logs", "stop", "resume", "run"} <= named <= known


TASKS = [
    (file.name, number, text)
    for file in (
        ROOT / "README.md",
        ROOT / "docs" / "campaigns.md",
        ROOT / "docs" / "evaluation.md",
    )
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", file.read_text(), re.DOTALL))
    if re.search(r"^kind: (exact_match|multiple_choice|generation)", text, re.MULTILINE)
]


@pytest.mark.parametrize(("file", "number", "text"), TASKS)
def test_a_task_of_the_documentation_can_be_loaded(
    file: str, number: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On files that have the form that the page tells."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items").mkdir()
    (row,) = re.findall(
        r"```json\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL
    )
    columns = [json.loads(row) | {"nr": n, "The question": f"{n}?"} for n in range(20)]
    write_lines(tmp_path / "items" / "train.jsonl", columns[:-1])
    write_lines(tmp_path / "items" / "dev.jsonl", columns[-1:])
    multiple_choice = "kind: multiple_choice" in text
    for split in ("search", "holdout"):
        item = {"id": split, "prompt": f"{split}?", "answer": "yes"}
        more = {"choices": ["yes", "no"], "answer": 0} if multiple_choice else {}
        write_lines(tmp_path / "items" / f"{split}.jsonl", [item | more])
    given = yaml.safe_load(text)
    source = given.get("source", {})
    if "reasoning_gym" in source:
        pytest.importorskip("reasoning_gym")
    if "dataset" in source:  # the rows of its page on the hub
        columns = [
            {"id": f"M{n}", "question": f"{n}?", "choices": {"text": ["a", "b"], "label": ["1", "2"]},
             "answerKey": "2"} for n in range(2)
        ]  # fmt: skip
        for number, split in enumerate(("train", "test")):
            write_lines(tmp_path / f"{split}.jsonl", columns[number : number + 1])
        kept = {key: source[key] for key in source if key not in ("dataset", "config", "revision")}
        given["source"] = {"files": {"train": "train.jsonl", "test": "test.jsonl"}} | kept
    task = load_task("t", yaml.safe_dump(given), {"search": 4, "holdout": 4})
    assert all(task.items.values())


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_source_of_items_is_shown() -> None:
    shown = [yaml.safe_load(text) for file, _, text in TASKS if file == "evaluation.md"]
    assert {key for task in shown for key in task.get("source", {})} >= set(SOURCES)
    assert any("items" in task for task in shown)


def test_every_rule_and_shipped_task_is_in_a_table() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(\w+)`", " ".join(table)))
    assert set(RULES) | {file.stem for file in (ROOT / "conf" / "task").glob("*.yaml")} <= named
    for rule in COMPARISONS:
        assert f"`{rule}`" in page


def test_links_lead_somewhere() -> None:
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", file.read_text()):
            if link[0] and "://" not in link[0]:
                assert (file.parent / link[0]).exists(), (file.name, link)
            if link[1]:
                target = file.parent / link[0] if link[0] else file
                heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert link[1][1:] in slugs, (file.name, link)
