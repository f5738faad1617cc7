"""What a job takes along: the very campaign, for another machine and another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config import load_config
from orchestrator.inputs import open_inputs
from orchestrator.jobs.bundle import CAMPAIGN_FILE, bundle_campaign
from orchestrator.jobs.submitting import chosen_environment, new_job, submit_campaign
from tests.campaigns import write_campaign
from workers.errors import BadInputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a user submits from, with a task of their own in it."""
    folder = tmp_path / "home"
    (folder / "items").mkdir(parents=True)
    for split in ("search", "holdout"):
        rows = [{"id": f"{n}", "prompt": f"{split} {n}", "answer": "x"} for n in range(4)]
        (folder / "items" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_task(
        folder / "mine.yaml", {"search": "items/search.jsonl", "holdout": "./items/holdout.jsonl"}
    )
    (folder / "text.txt").write_text("one text\n\nand another\n")
    monkeypatch.chdir(folder)
    return folder


def write_task(file: Path, items: dict[str, str]) -> None:
    file.write_text(yaml.safe_dump({"kind": "exact_match", "items": items}))


def campaign(**changes: Any) -> Any:
    return load_config(str(write_campaign(Path.cwd(), **changes)))


def test_a_campaign_is_the_same_in_another_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = campaign(
        store="runs",
        tasks=[{"name": "./mine.yaml", "search_items": 3}, {"name": "sort", "search_items": 8}],
        health={"text": "text.txt"},
        driver={"cpus": 0.5, "resources": {"driver": 1}},
    )
    identity = open_inputs(config).identity(config)
    bundle = bundle_campaign(config)
    (tmp_path / "job").mkdir()
    bundle.write(tmp_path / "job", with_code=False)
    for file in (home / "mine.yaml", home / "text.txt", *(home / "items").iterdir()):
        file.unlink()
    monkeypatch.chdir(tmp_path / "job")
    there = load_config(CAMPAIGN_FILE)
    assert there.store == str(home / "runs")
    assert there.driver == config.driver
    own = open_inputs(there).identity(there)
    assert own.pop("health")["text"] == "text.txt" == identity.pop("health")["text"]
    assert own == identity


def test_texts_are_taken_along_as_they_are_read(home: Path) -> None:
    options = {
        "one": "\\${not} an interpolation",
        "two": "${name} is one",
        "three": ["é", "${seed}"],
    }
    config = campaign(engine={"kind": "vllm", "vllm": options})
    (home / "again.yaml").write_text(bundle_campaign(config).text, encoding="utf-8")
    assert config.engine.vllm["one"] == "${not} an interpolation"
    assert config.engine.vllm["two"] == "small is one"
    assert load_config("again.yaml").engine == config.engine


def test_what_is_not_in_the_current_folder_is_left_to_the_nodes(home: Path) -> None:
    (home.parent / "outside.yaml").write_text((home / "mine.yaml").read_text())
    (home / "models").mkdir()  # else it would be the hub's
    parents = [{"name": "a", "path": "models/a"}, {"name": "b", "path": "/models/b"}]
    bundle = bundle_campaign(
        campaign(
            parents=parents,
            base="s3://bucket/base",
            tasks=[{"name": "../outside.yaml"}],
            store="runs",
        )
    )
    outside = str(home.parent / "outside.yaml")
    assert bundle.config.tasks[0].name == outside
    assert bundle.left_on_nodes == [
        str(home / "runs"),
        str(home / "models/a"),
        "/models/b",
        outside,
    ]
    # Its items are looked for from the folder in which the driver is started.
    assert sorted(bundle.files) == ["items/holdout.jsonl", "items/search.jsonl"]


def test_a_model_of_the_hub_stays_one(home: Path) -> None:
    parents = [{"name": "a", "path": "org/name"}, {"name": "b", "path": "hf://org/other@main"}]
    bundle = bundle_campaign(campaign(parents=parents, base="org/name+org/adapter"))
    assert [parent.path for parent in bundle.config.parents] == [
        "hf://org/name",
        "hf://org/other@main",
    ]
    assert bundle.config.base == "hf://org/name+hf://org/adapter"


def test_items_that_cannot_go_along_are_named(home: Path) -> None:
    write_task(home / "mine.yaml", {"search": "../else.jsonl", "holdout": "items/holdout.jsonl"})
    with pytest.raises(
        BadInputError, match=r"mine\.yaml: \.\./else\.jsonl is not in the current folder"
    ):
        bundle_campaign(campaign(tasks=[{"name": "mine.yaml"}]))
    with pytest.raises(BadInputError, match=r"there is no file absent\.yaml"):
        bundle_campaign(campaign(tasks=[{"name": "absent.yaml"}]))


def test_a_job_runs_the_code_that_came_along(home: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    bundle_campaign(campaign()).write(job, with_code=True)
    assert not list(job.rglob("__pycache__"))
    program = "import orchestrator.cli as o, workers as w; print(o.__file__); print(w.__file__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=job, env=environment, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    assert out.split() == [str(job / "orchestrator/cli.py"), str(job / "workers/__init__.py")]
    assert (job / "workers/families/strings/base/config.json").is_file()


def test_models_that_ship_go_along_only_if_they_are_named(home: Path, tmp_path: Path) -> None:
    places = [{"name": name, "path": f"s3://bucket/{name}"} for name in ("a", "b")]
    bundle = bundle_campaign(campaign(parents=places, base=None, tasks=[{"name": "mine.yaml"}]))
    job = tmp_path / "job"
    job.mkdir()
    bundle.write(job, with_code=True)
    assert not list(job.rglob("*.safetensors"))
    assert (job / "workers/families/__init__.py").is_file()
    shipped_task = bundle_campaign(campaign(parents=places, base=None, tasks=[{"name": "sort"}]))
    assert shipped_task.names_shipped and not bundle.names_shipped


def test_the_id_of_a_job_tells_stores_names_and_submissions_apart() -> None:
    ids = {
        new_job(name, f"{store}/{name}", number, "").id
        for store in ("/runs", "s3://bucket/runs")
        for name in ("demo", "other")
        for number in (1, 2)
    }
    assert len(ids) == 8
    assert new_job("demo", "/runs/demo", 1, "a").id == new_job("demo", "/runs/demo", 1, "b").id


# -- secrets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("AWS_SECRET_ACCESS_KEY=planted", "has the name of a secret"),
        ("AWS_ACCESS_KEY_ID=planted", "has the name of a secret"),
        ("AWS_SESSION_TOKEN=planted", "has the name of a secret"),
        ("HF_TOKEN=planted", "has the name of a secret"),
        ("RAY_AUTH_TOKEN=planted", "has the name of a secret"),
        ("OPENAI_API_KEY=planted", "has the name of a secret"),
        ("REGISTRY_AUTH=planted", "has the name of a secret"),
        ("PROXY=http://me:planted@host", "a URL with a user or a password"),
        ("INNOCENT=planted-value", "the value of the environment variable MY_SERVICE_SECRET"),
        ("planted", "is not NAME=VALUE"),
        ("A B=planted", "is not NAME=VALUE"),
    ],
)
def test_variables_for_a_job_are_no_credentials(
    home: Path, monkeypatch: pytest.MonkeyPatch, assignment: str, problem: str
) -> None:
    monkeypatch.setenv("MY_SERVICE_SECRET", "planted-value")
    cluster: Any = None  # it is not asked
    with pytest.raises(BadInputError, match=problem) as caught:
        submit_campaign(campaign(), cluster, print, assignments=[assignment])
    assert assignment == "planted" or "planted" not in str(caught.value)


def test_variables_that_only_sound_like_credentials_are_taken() -> None:
    chosen = chosen_environment(["RAY_AUTH_MODE=token", "HF_TOKEN_PATH=/run/token", "EMPTY="])
    assert chosen == {"RAY_AUTH_MODE": "token", "HF_TOKEN_PATH": "/run/token", "EMPTY": ""}
