"""What a campaign works on: parents that fit together, and the identity of all that decides."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from orchestrator import inputs
from orchestrator.config import OPERATIONAL_KEYS, CampaignConfig, load_config
from orchestrator.inputs import Inputs, absolute_places, check_parents, open_inputs
from orchestrator.overview import campaign_overview
from tests.families import write_model
from tests.scripted_campaign import run_search, scripted
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three relatives, `base`, `one` and `two`, and a model with a vision tower, `seeing`."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        write_model(root / name, "qwen3_5", seed, spread=0.02 if seed else 0.0)
    write_model(root / "seeing", "qwen3_5_vision", 0)
    return root


class Project:
    """A folder of one's own with copies of the models, a task and a campaign."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        shutil.copytree(models, folder / "models")
        self.write_task("t", "abc")

    def write_task(self, name: str, letters: str, holdout: str = "xyz") -> None:
        files = {}
        for split, prompts in (("search", letters), ("holdout", holdout)):
            rows = [{"id": f"{n}", "prompt": p, "answer": "y"} for n, p in enumerate(prompts)]
            file = self.folder / f"{name}.{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = str(file)
        task = {"kind": "exact_match", "items": files}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(task))

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def config(self, *overrides: str) -> CampaignConfig:
        campaign = {
            "name": "x",
            "parents": [{"name": name, "path": str(self.model(name))} for name in ("one", "two")],
            "base": str(self.model("base")),
            "tasks": [{"name": str(self.folder / "t.yaml")}],
        }
        file = self.folder / "campaign.yaml"
        file.write_text(yaml.safe_dump(campaign))
        return load_config(str(file), list(overrides))

    def open(self, *overrides: str) -> Inputs:
        return open_inputs(self.config(*overrides))

    def identity(self, *overrides: str) -> dict[str, Any]:
        config = self.config(*overrides)
        return open_inputs(config).identity(config)

    def refusal(self, *overrides: str) -> str:
        with pytest.raises(BadInputError) as caught:
            self.open(*overrides)
        return str(caught.value)

    def edit_json(self, name: str, file: str, **changes: Any) -> None:
        path = self.model(name) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def project(tmp_path: Path, models: Path) -> Project:
    return Project(tmp_path / "project", models)


# -- opening ---------------------------------------------------------------------------------


def test_the_first_parent_is_the_father(project: Project) -> None:
    inputs = project.open()
    assert list(inputs.parents) == ["one", "two"]
    assert inputs.father.location == str(project.model("one"))
    assert [r.name for r in inputs.references] == ["one", "two"]
    assert inputs.references[0].fingerprint == inputs.father.fingerprint
    assert inputs.base is not None
    assert inputs.base_reference is not None
    assert (inputs.base_reference.name, inputs.base_reference.fingerprint) == (
        "base", inputs.base.fingerprint,
    )  # fmt: skip
    assert inputs.father_map.layers == 4
    assert [task.name for task in inputs.tasks] == ["t"]


def test_a_base_is_not_needed(project: Project) -> None:
    inputs = project.open("base=null")
    assert inputs.base is None
    assert inputs.base_reference is None
    assert absolute_places(inputs)[1] is None


def test_a_method_without_two_task_vectors_is_refused_unless_allowed(project: Project) -> None:
    shutil.rmtree(project.model("two"))
    shutil.copytree(project.model("base"), project.model("two"))
    project.open("genome.method=task_arithmetic")
    message = project.refusal("genome.method=ties")
    assert "method ties" in message
    assert "two is the base" in message
    assert "task_arithmetic" in message
    assert "genome.allow_degenerate: true" in message
    project.open("genome.method=ties", "genome.allow_degenerate=true")


def test_the_limits_of_a_task_are_kept(project: Project) -> None:
    (task,) = project.open("tasks.0.search_items=2", "tasks.0.holdout_items=1").tasks
    assert [len(task.items[split]) for split in ("search", "holdout")] == [2, 1]


def test_more_items_than_there_are_is_said(project: Project) -> None:
    assert project.open("tasks.0.search_items=3", "tasks.0.holdout_items=3").warnings == []
    (warning,) = project.open("tasks.0.search_items=4", "tasks.0.holdout_items=3").warnings
    assert (
        warning
        == "task t: search_items is 4, but its search split has 3 items: all of them are taken"
    )


def test_a_text_model_and_the_text_part_of_another_fit_together(project: Project) -> None:
    assert len(project.open(f"parents.1.path={project.model('seeing')}").parents) == 2


def test_what_is_not_there_is_refused(project: Project) -> None:
    assert "nowhere" in project.refusal("parents.1.path=nowhere")
    assert "nowhere" in project.refusal("base=nowhere")
    assert "'nowhere'" in project.refusal("tasks.0.name=nowhere")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"kind: ["])
def test_a_task_that_cannot_be_read_is_named(project: Project, content: bytes) -> None:
    (project.folder / "t.yaml").write_bytes(content)
    message = project.refusal()
    assert "t.yaml" in message or message.startswith("task t: ")


def test_tasks_of_a_campaign_may_not_share_questions_across_splits(project: Project) -> None:
    project.write_task("u", "dx", holdout="e")
    tasks = [{"name": str(project.folder / f"{name}.yaml")} for name in "tu"]
    message = project.refusal(f"tasks={json.dumps(tasks)}")
    assert "held-out item '0' of task t" in message
    assert "search item '1' of task u" in message


def test_places_are_made_absolute_for_workers_elsewhere(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("HOME", str(project.folder))
    parents, base = absolute_places(
        project.open(
            "parents.0.path=models/one",
            f"parents.1.path=file://{project.model('two')}/",
            "base=~/models/base",
        )
    )
    assert parents == {name: str(project.model(name)) for name in ("one", "two")}
    assert base == str(project.model("base"))


# -- do the parents fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 8),
        ("layer_types", ["full_attention"] * 4),
        ("n_head", 2),  # GPT-2
        ("mamba_num_heads", 8),
        ("attention_multiplier", 8),
        ("routed_scaling_factor", 2.5),
    ],
)
@pytest.mark.parametrize("name", ["two", "base"])
def test_weights_of_another_meaning_are_refused(
    project: Project, name: str, key: str, value: Any
) -> None:
    father = json.loads((project.model("one") / "config.json").read_text())
    if key not in father:
        for other in ("one", "two", "base"):
            project.edit_json(other, "config.json", **{key: 1})
    project.edit_json(name, "config.json", **{key: value})
    message = project.refusal()
    assert message.startswith(f"{name} ({project.model(name)}): config.json has {key} {value!r}")


def test_the_meaning_of_a_text_part_counts(project: Project) -> None:
    path = project.model("seeing") / "config.json"
    text = json.loads(path.read_text())["text_config"] | {"head_dim": 8}
    project.edit_json("seeing", "config.json", text_config=text)
    assert "head_dim 8" in project.refusal(f"parents.1.path={project.model('seeing')}")


def test_what_only_one_parent_says_is_no_contradiction(project: Project) -> None:
    project.edit_json("two", "config.json", head_dim=None, num_experts_per_tok=2)
    project.open()


def edit_vocabulary(project: Project, name: str, edit: Any) -> None:
    path = project.model(name) / "tokenizer.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["two", "base"])
def test_another_vocabulary_is_refused_with_the_token(project: Project, name: str) -> None:
    def swap(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_vocabulary(project, name, swap)
    message = project.refusal()
    assert message.startswith(f"{name} ({project.model(name)}): token ")
    assert "'a'" in message
    assert "'b'" in message
    assert "vocabulary: union" in message
    assert "a campaign needs parents of one vocabulary" in message


@pytest.mark.parametrize("choice", ["union", "base", "two"])
def test_a_recipe_that_chooses_a_vocabulary_may_have_parents_of_different_ones(
    project: Project, choice: str
) -> None:
    edit_vocabulary(project, "two", lambda data: data["added_tokens"][0].update(content="<other>"))
    parents = {name: open_checkpoint(str(project.model(name))) for name in ("one", "two")}
    with pytest.raises(BadInputError, match="<other>"):
        check_parents(parents)
    check_parents(parents, choice)
    project.edit_json("two", "config.json", head_dim=8)
    parents["two"] = open_checkpoint(str(project.model("two")))
    with pytest.raises(BadInputError, match="head_dim 8"):
        check_parents(parents, choice)


def test_another_added_token_is_refused(project: Project) -> None:
    edit_vocabulary(project, "two", lambda data: data["added_tokens"][0].update(content="<other>"))
    assert "'<other>'" in project.refusal()


@pytest.mark.parametrize(
    ("override", "off"), [("experts.match=weights", "none"), ("workers.gang=2", "1")]
)
def test_a_dense_model_has_no_experts_to_match_or_to_divide(
    project: Project, override: str, off: str
) -> None:
    key = override.partition("=")[0]
    with pytest.raises(
        BadInputError, match=rf"^{re.escape(key)}: .*one has no routed experts: set {key} to {off}$"
    ):
        open_inputs(project.config(override))


def test_more_and_fewer_tokens_and_no_tokenizer_at_all_are_accepted(project: Project) -> None:
    edit_vocabulary(project, "two", lambda data: data["model"]["vocab"].update(more=39))
    edit_vocabulary(project, "base", lambda data: data["model"]["vocab"].pop("z"))
    project.open()
    (project.model("two") / "tokenizer.json").unlink()
    project.open()


def test_a_vocabulary_that_is_a_list_is_read_too(project: Project) -> None:
    def as_list(data: dict[str, Any]) -> None:
        tokens = sorted(data["model"]["vocab"].items(), key=lambda entry: entry[1])
        data["model"]["vocab"] = [[token, -1.0] for token, _ in tokens]

    edit_vocabulary(project, "two", as_list)
    project.open()
    edit_vocabulary(project, "two", lambda data: data["model"]["vocab"][5].__setitem__(0, "?!"))
    assert "'?!'" in project.refusal()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        '{"model": [1]}',
        '{"model": "x"}',
        '{"model": {"vocab": [1, 2]}}',
        '{"model": {"vocab": [[]]}}',
        '{"model": {"vocab": {"a": []}}}',
        '{"added_tokens": 5}',
        '{"added_tokens": [5]}',
        '{"added_tokens": [{"id": 1}]}',
        "{",
    ],
)
def test_a_malformed_tokenizer_is_refused_by_its_file(project: Project, content: str) -> None:
    path = project.model("two") / "tokenizer.json"
    path.write_text(content)
    assert project.refusal().startswith(f"{path}: ")


# -- identity --------------------------------------------------------------------------------


def test_places_are_not_part_of_the_identity(
    project: Project, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = project.identity()
    elsewhere = Project(tmp_path / "elsewhere", models)
    assert elsewhere.identity() == identity
    monkeypatch.chdir(project.folder)
    assert project.identity("parents.0.path=models/one", "base=./models/base") == identity
    assert str(tmp_path) not in json.dumps(identity)


@pytest.mark.parametrize(
    "override",
    [
        "store=other",
        "address=auto",
        "priority=-1",
        "workers.count=7",
        "workers.cpus=2",
        "workers.gpus=1",
        "workers.memory=3",
        "workers.resources={fast: 1}",
        "workers.pools=[{count: 2, gpus: 1}]",
    ],
)
def test_what_cannot_change_the_result_is_not_part_of_the_identity(
    project: Project, override: str
) -> None:
    assert override.partition("=")[0] in OPERATIONAL_KEYS
    assert project.identity(override) == project.identity()


@pytest.mark.parametrize(
    "override",
    [
        "name=y",
        "seed=1",
        "objective=worst",
        "base=null",
        "genome.space=blocks",
        "genome.method=ties",
        "genome.blocks=2",
        "genome.genes.weight={low: 0, high: 1, start: 0.5}",
        "search.optimizer=random",
        "search.evaluations=201",
        "search.population=5",
        "search.step=0.3",
        "engine.dtype=float32",
        "engine.device=cuda",
        "engine.threads=2",
        "engine.batch_size=8",
        "tasks.0.search_items=2",
        "tasks.0.holdout_items=2",
        "parents.0.name=uno",
    ],
)
def test_what_can_change_the_result_is_part_of_the_identity(
    project: Project, override: str
) -> None:
    assert project.identity(override) != project.identity()


@pytest.mark.parametrize("change", ["order", "weights", "base", "task"])
def test_contents_are_part_of_the_identity(project: Project, models: Path, change: str) -> None:
    before = project.identity()
    if change == "order":
        paths = [str(project.model(name)) for name in ("two", "one")]
        overrides = [f"parents.{n}.path={path}" for n, path in enumerate(paths)]
        assert project.identity(*overrides) != before
        return
    if change == "task":
        project.write_task("t", "abd")
    else:
        name = "two" if change == "weights" else "base"
        path = project.model(name) / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert project.identity() != before


def test_what_does_not_count_is_not_in_the_identity(tmp_path: Path) -> None:
    """Of other engines, and of rules by places of experts."""
    identity = scripted(tmp_path, lambda recipe, item: True).identity
    assert identity["engine"].keys() == {"dtype", "device", "threads", "batch_size"}
    assert identity["genome"]["content"] == (
        "c8754287b5c4aaf0bae8937a0a1ff445b5dfe5f4faa55eb1462e663b4c7633cd"
    )


def test_a_campaign_of_parents_that_no_merge_takes_is_refused(
    project: Project, tmp_path: Path
) -> None:
    """Before anything is begun, as `darwin merge` refuses them."""
    parents = [{"name": name, "path": str(project.model(name))} for name in ("one", "two")]
    given: dict[str, Any] = {"parents": parents, "base": str(project.model("base"))}
    weights = project.model("two") / "model.safetensors"
    tensors = load_file(weights)
    bias = "model.layers.0.mlp.up_proj.bias"
    save_file(tensors | {bias: torch.ones(4)}, weights)
    with pytest.raises(BadInputError, match=rf"two \(.*{bias}"):
        scripted(tmp_path, lambda recipe, item: True, **given)
    for name in ("one", "two"):
        renamed = {name.replace("layers.", "h."): found for name, found in tensors.items()}
        save_file(renamed, project.model(name) / "model.safetensors")
    with pytest.raises(BadInputError, match="one: none of its layers is known by name"):
        scripted(tmp_path, lambda recipe, item: True, **given)


def test_a_campaign_that_another_version_began_is_refused_for_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for keys of its file, none of which has changed. What is recorded of it can be read."""
    with monkeypatch.context() as older:
        older.setattr(inputs, "SCORING", inputs.SCORING - 1)
        campaign = scripted(tmp_path, lambda recipe, item: True)
        run_search(campaign)
    with pytest.raises(BadInputError, match="of another version of Darwin"):
        scripted(tmp_path, lambda recipe, item: True).run()
    assert campaign_overview(campaign.store.uri)["status"] == "unfinished"
