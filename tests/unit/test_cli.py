"""The `darwin` command: what it prints where, how it ends, and that no input makes it stumble."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from orchestrator import cli, single_merge
from orchestrator.config import config_to_dict, load_config
from orchestrator.console import json_alone, print_json
from orchestrator.ledger.ledger import Ledger
from orchestrator.mri.prescription import prescribe
from tests.checkpoint_files import write_checkpoint
from tests.compose import ROOT
from tests.families import write_family
from workers.checkpoints import open_checkpoint
from workers.storage import StorageError, open_store


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        assert self.out.count("\n") == 1
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """The one line of an error, the last on standard error; progress may come before it."""
        *progress, last, end = self.err.split("\n")
        assert end == ""
        assert last.startswith("darwin: ")
        assert not any(line.startswith(("darwin: ", "Traceback")) for line in progress)
        return last.removeprefix("darwin: ")


class Darwin:
    """Runs the command in this process, as the installed script does."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch = patch
        self.capture = capture

    def __call__(self, *arguments: object) -> Outcome:
        self.capture.readouterr()
        self.patch.setattr(sys, "argv", ["darwin", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = self.capture.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, printed.out, printed.err)


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Darwin:
    return Darwin(monkeypatch, capsys)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two relatives, in files of two shards each."""
    root = tmp_path_factory.mktemp("family")
    return write_family(root, "qwen3", max_shard_size="40KB")


def write_recipe(folder: Path, family: list[Path], **changes: Any) -> Path:
    """A recipe of two parents, by default of their even mean, with keys changed."""
    parents = [
        {"name": name, "path": str(path)} for name, path in zip("ab", family[1:], strict=True)
    ]
    rules = [{"method": "linear", "parameters": {"weight": 0.5}}]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"parents": parents, "rules": rules} | changes))
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


# -- merge -----------------------------------------------------------------------------------


def test_merge_writes_the_mean_of_two_parents(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "child"
    done = darwin("merge", write_recipe(tmp_path, family), out, "--json")
    assert done.code == 0
    first, second, child = (weights(folder) for folder in (*family[1:], out))
    assert child.keys() == first.keys()
    for name, found in child.items():
        wanted = ((first[name].double() + second[name].double()) / 2).to(torch.bfloat16)
        assert torch.equal(found, wanted), name
    assert done.json == {
        "status": "done",
        "child": str(out),
        "recipe_id": done.json["recipe_id"],
        "tensors": len(child),
        "bytes": sum(tensor.nbytes for tensor in child.values()),
    }


def test_merge_writes_a_whole_checkpoint_with_its_lineage(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "child"
    rule = {"method": "task_arithmetic", "parameters": {"weight": {"a": 1, "b": 0.5}}}
    recipe = write_recipe(tmp_path, family, base=str(family[0]), rules=[rule], seed=4)
    recipe_id = darwin("merge", recipe, out, "--json").json["recipe_id"]
    father, child = open_checkpoint(str(family[1])), open_checkpoint(str(out))
    assert len(father.weight_files) > 1
    assert [file.name for file in child.weight_files] == [file.name for file in father.weight_files]
    assert set(child.companions) == {*father.companions, "lineage.json"}
    lineage = child.read_json("lineage.json")
    assert lineage["recipe_id"] == recipe_id
    assert [parent["fingerprint"] for parent in lineage["parents"]] == [
        open_checkpoint(str(path)).fingerprint for path in family[1:]
    ]
    assert {tensor["method"] for tensor in lineage["tensors"]} == {"task_arithmetic"}
    assert set(lineage["files"]) == {file.name for file in child.weight_files}


def test_attribute_measures_what_merge_wrote(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    rule = {"method": "linear", "parameters": {"weight": {"a": 0.25, "b": 0.75}}}
    darwin("merge", write_recipe(tmp_path, family, rules=[rule]), tmp_path / "child")
    parents = [f"--parent={name}={path}" for name, path in zip("ab", family[1:], strict=True)]
    found = darwin("attribute", tmp_path / "child", *parents, "--json")
    assert found.code == 0
    assert found.json["total"]["shares"] == pytest.approx({"a": 0.25, "b": 0.75}, abs=0.01)
    shown = darwin("attribute", tmp_path / "child", *parents, f"--base={family[0]}")
    assert shown.code == 0
    mlp = next(line.split() for line in shown.out.splitlines() if line.startswith("mlp"))
    assert [float(cell.rstrip("%")) for cell in mlp[2:5]] == pytest.approx([25, 75, 0], abs=1)
    assert "(recipe)" in shown.out
    alone = darwin("attribute", tmp_path / "child", parents[0], "--json")
    assert alone.code == 2
    assert "name its other parents, or the base" in alone.error
    wrong = darwin("attribute", tmp_path / "child", "--parent=a", "--json")
    assert wrong.code == 2
    assert wrong.json["status"] == "bad input"


def test_merge_stacks_layers_as_a_mergekit_file_says(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    slices = [
        {"sources": [{"model": str(family[1]), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(family[2]), "layer_range": [1, 4]}]},
    ]
    file = tmp_path / "stack.yaml"
    data = {"slices": slices, "merge_method": "passthrough", "chat_template": template}
    file.write_text(yaml.safe_dump(data))
    out = tmp_path / "child"
    assert darwin("merge", file, out).code == 0
    first, second, child = (weights(folder) for folder in (*family[1:], out))
    for name, found in child.items():
        source, origin = (first if "embed_tokens" in name else second), name
        number = re.search(r"(?<=layers\.)\d+", name)
        if number is not None:
            layer = int(number[0])
            source = first if layer < 3 else second
            origin = name.replace(f"layers.{layer}.", f"layers.{layer - 2 * (layer >= 3)}.")
        assert torch.equal(found, source[origin]), name
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert (out / "chat_template.jinja").read_text() == template


def test_merge_warns_of_what_a_mergekit_file_does_not_mean(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "ties.yaml"
    models = [{"model": str(family[1]), "parameters": {"weight": 1}}]
    data = {"models": models, "merge_method": "ties", "base_model": str(family[0])}
    file.write_text(yaml.safe_dump(data))
    done = darwin("merge", file, tmp_path / "child")
    assert done.code == 0
    assert f"darwin: warning: {file}: method ties needs 2 parents" in done.err


def test_merge_warns_of_another_epsilon_and_keeps_the_fathers(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    mother = tmp_path / "mother"
    shutil.copytree(family[2], mother)
    config = json.loads((mother / "config.json").read_text())
    (mother / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    done = darwin("merge", write_recipe(tmp_path, [*family[:2], mother]), tmp_path / "child")
    assert done.code == 0
    assert f"darwin: warning: b ({mother}): config.json has rms_norm_eps 0.5, but a" in done.err
    child = json.loads((tmp_path / "child" / "config.json").read_text())
    assert child["rms_norm_eps"] == config["rms_norm_eps"]


def test_merge_warns_of_tensors_that_no_rule_knows(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    places = []
    for place in family[1:]:
        tensors = weights(place) | {"outer.weight": torch.ones(64, 64), "odd.x": torch.ones(3)}
        # Follows from the configuration: nobody misses it.
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        copied = json.loads((place / "config.json").read_text())
        places.append(write_checkpoint(tmp_path / place.name, tensors, config=copied))
    known = sum(tensor.nbytes for tensor in weights(family[1]).values())
    share = 100 * (64 * 64 + 3) * 4 / (known + (64 * 64 + 3 + 4) * 4)
    parents = [{"name": place.name, "path": str(place)} for place in places]
    linear = {"method": "linear", "parameters": {"weight": 1}}
    file = tmp_path / "recipe.yaml"
    for names, wanted in (
        ([], ["2 tensors", f"{share:.3g} %", "'odd.x'", str(places[0])]),
        (["odd.x"], ["1 tensor ", "'outer.weight'"]),
        (["odd.x", "outer.*"], []),
    ):
        named = [{"where": {"names": [name]}} | linear for name in names]
        file.write_text(yaml.safe_dump({"parents": parents, "rules": [linear, *named]}))
        done = darwin("merge", file, tmp_path / f"child{len(names)}")
        assert done.code == 0
        assert ("warning" in done.err) == bool(wanted)
        for part in wanted:
            assert part in done.err


def test_recipe_prints_the_other_spelling(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, family)
    theirs = darwin("recipe", recipe)
    assert theirs.code == 0
    assert yaml.safe_load(theirs.out)["merge_method"] == "linear"
    file = tmp_path / "theirs.yaml"
    file.write_text(theirs.out)
    assert yaml.safe_load(darwin("recipe", file).out)["rules"][0]["method"] == "linear"
    assert yaml.safe_load(darwin("recipe", file, "--to", "mergekit", "--json").json["recipe"]) == (
        yaml.safe_load(theirs.out)
    )
    assert "none of darwin, mergekit" in darwin("recipe", recipe, "--to", "yaml").error


def test_merge_says_in_one_line_what_it_wrote(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "a [/bold] folder with a long name, and :smile: in it" / "child"
    done = darwin("merge", write_recipe(tmp_path, family), out)
    assert done.code == 0
    assert done.out.startswith(f"{out}: {len(weights(out))} tensors, recipe ")
    assert done.out.count("\n") == 1


def test_the_same_recipe_writes_the_same_bytes(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, family)
    for name in ("one", "two"):
        assert darwin("merge", recipe, tmp_path / name).code == 0
    one, two = (open_store(str(tmp_path / name)) for name in ("one", "two"))
    keys = [info.key for info in one.list_objects()]
    assert keys == [info.key for info in two.list_objects()]
    assert all(one.read(key) == two.read(key) for key in keys)


def test_merge_leaves_a_place_that_is_not_empty_alone(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, family)
    out = tmp_path / "taken"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = darwin("merge", recipe, out)
    assert refused.code == 2
    assert f"{out}: is not empty" in refused.error
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert darwin("merge", recipe, family[1]).code == 2
    assert darwin("merge", recipe, out / "notes.txt").code == 2


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"method": "linear"}, "rules.0"),
        ({"method": "ties", "parameters": {"weight": 1, "density": 0.5}}, "rules.0"),
        ({"method": "linear", "parameters": {"weight": 1}, "where": {"layers": [7, 9]}}, "layers"),
    ],
)
def test_a_rule_that_cannot_work_fails_before_anything_is_written(
    darwin: Darwin, family: list[Path], tmp_path: Path, rule: dict[str, Any], named: str
) -> None:
    refused = darwin(
        "merge", write_recipe(tmp_path, family, rules=[rule]), tmp_path / "out", "--json"
    )
    assert refused.code == 2
    assert named in refused.error
    assert refused.json == {"status": "bad input", "error": refused.error}
    assert not (tmp_path / "out").exists()


# -- align -----------------------------------------------------------------------------------


def test_align_fails_where_a_mother_gives_nothing_unless_it_is_allowed(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    """The mother is the father himself: nothing would change."""
    text, out = tmp_path / "text.txt", tmp_path / "aligned"
    text.write_text("the quick brown fox jumps over the lazy dog\n\nand back again = yes\n")
    command = ["align", family[0], family[0], out, "--calibration", text, "--threads", 1]
    failed = darwin(*command)
    assert failed.code == 1
    assert "less than 1%" in failed.error and "--allow-low-coverage" in failed.error
    assert not (out / "config.json").exists()
    assert darwin(*command, "--json").json["status"] == "failed"
    done = darwin(*command, "--allow-low-coverage", "--json")
    assert done.code == 0
    assert done.json["aligned"] == str(out)
    assert done.json["matched_layers"] == done.json["layers"] == 4
    assert done.json["coverage"]["total"] == 0
    for name, tensor in weights(family[0]).items():
        assert torch.equal(weights(out)[name], tensor), name


def test_align_says_what_is_wrong_with_its_input(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    assert darwin("align", family[0], family[1], tmp_path / "out").code == 2
    nowhere = tmp_path / "nowhere.txt"
    failed = darwin("align", family[0], family[1], tmp_path / "out", "--calibration", nowhere)
    assert failed.code == 2
    assert str(nowhere) in failed.error


# -- inspect ---------------------------------------------------------------------------------


def test_inspect_counts_what_is_there(darwin: Darwin, family: list[Path]) -> None:
    done = darwin("inspect", family[0], "--json")
    stored = weights(family[0])
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert found["status"] == "done"
    assert found["tensors"] == len(stored)
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert found["bytes"] == 2 * found["parameters"]
    assert (found["model_type"], found["layers"], found["experts"]) == ("qwen3", 4, 0)
    assert found["unknown"] == []
    components = found["components"]
    assert components.keys() == {"embedding", "attention", "mlp", "norm"}
    for key in ("tensors", "parameters", "bytes"):
        assert sum(row[key] for row in components.values()) == found[key]
    assert components["mlp"] == {
        "tensors": 12, "parameters": 12 * 32 * 48, "bytes": 24 * 32 * 48, "dtypes": ["BF16"], "layers": 4,
    }  # fmt: skip


def test_inspect_shows_the_same_to_a_person(darwin: Darwin, family: list[Path]) -> None:
    shown = darwin("inspect", family[0])
    for part in (
        str(family[0]),
        "qwen3",
        "4 layers",
        "embedding",
        "attention",
        "mlp",
        "norm",
        "BF16",
    ):
        assert part in shown.out
    assert f"{12 * 32 * 48:,}" in shown.out


def test_inspect_shows_the_names_of_unknown_tensors_whatever_they_are(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "[/strange]"}')
    names = ["we[/bold]ird", "a:smile:b", "clear\x1b[2J"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    shown = darwin("inspect", tmp_path)
    assert shown.code == 0
    for part in ("[/strange]", "we[/bold]ird", "a:smile:b", "x1b[2J"):
        assert part in shown.out
    assert "\x1b" not in shown.out
    assert darwin("inspect", tmp_path, "--json").json["unknown"] == sorted(names)


# -- status and report -----------------------------------------------------------------------


def begun_campaign(folder: Path) -> str:
    """A campaign with one scored candidate of a budget of 5, as its ledger would tell."""
    file = folder / "campaign.yaml"
    parents = [{"name": name, "path": name} for name in "ab"]
    search = {"evaluations": 5}
    data = {"name": "x", "parents": parents, "tasks": [{"name": "t"}], "search": search}
    file.write_text(yaml.safe_dump(data))
    ledger = Ledger(open_store(str(folder / "runs" / "x")))
    ledger.open_epoch(1)
    ledger.append("campaign", identity={}, config=config_to_dict(load_config(str(file))))
    candidates = [{"genome": {"w": 0.5}, "recipe": "r1"}, {"genome": {"w": 0.7}, "recipe": "r2"}]
    ledger.append("asked", generation=0, candidates=candidates)
    results = [{"id": "1", "score": 1.0}, {"id": "2", "score": 0.0}]
    ledger.append(
        "scored", recipe="r1", split="search", worker=0, items={"t": results}, complete=True,
        realize_seconds=0.1, score_seconds=0.1,
    )  # fmt: skip
    return str(folder / "runs" / "x")


def test_status_tells_from_the_store_where_a_campaign_stands(
    darwin: Darwin, tmp_path: Path
) -> None:
    place = begun_campaign(tmp_path)
    found = darwin("status", place, "--json").json
    assert (found["status"], found["evaluations"], found["budget"]) == ("unfinished", 1, 5)
    assert found["best"] == {"recipe_id": "r1", "fitness": 0.5, "genome": {"w": 0.5}}
    assert found["child"] is None
    shown = darwin("status", place + "/")
    assert shown.code == 0
    for part in (place, "unfinished", "1 of 5", "0.500"):
        assert part in shown.out


def test_a_rejected_child_is_named_with_the_reason(darwin: Darwin, tmp_path: Path) -> None:
    place = begun_campaign(tmp_path)
    ledger = Ledger(open_store(place))
    ledger.open_epoch(2)
    reason = "perplexity: 99 on the shipped text (a 3, b 4)"
    ledger.append(
        "rejected", child="rejected/child-1", recipe_id="r1", evaluations=5, report="report.html",
        holdout_fitness={"child": 1.0, "a": 0.5, "b": 0.5}, gates={"perplexity": "failed"},
        reasons=[reason],
    )  # fmt: skip
    found = darwin("status", place, "--json").json
    assert (found["status"], found["reasons"]) == ("rejected", [reason])
    assert found["child"] == f"{place}/rejected/child-1"
    assert found["gates"] == {"perplexity": "failed"}
    shown = darwin("status", place)
    for part in ("rejected", reason, "rejected/child-1"):
        assert part in shown.out


def test_a_run_that_ends_with_a_rejected_child_has_an_exit_code_of_its_own(
    darwin: Darwin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a campaign gives back is seen in tests/end_to_end/test_gates.py."""
    from orchestrator import campaign

    result = {
        "status": "rejected", "child": "runs/x/rejected/child-1", "report": "runs/x/report.html",
        "beaten": [], "holdout_fitness": {"child": 0.2, "a": 0.5}, "reasons": ["layers: layer 2 is silent"],
    }  # fmt: skip

    class Ended:
        def __init__(self, *given: Any) -> None:
            pass

        def run(self) -> dict[str, Any]:
            return result

    monkeypatch.setattr(campaign, "Campaign", Ended)
    begun_campaign(tmp_path)
    ended = darwin("run", tmp_path / "campaign.yaml")
    assert ended.code == 3
    assert "rejected layers: layer 2 is silent" in ended.out
    with_json = darwin("run", tmp_path / "campaign.yaml", "--json")
    assert (with_json.code, with_json.json) == (3, result)


def test_there_is_no_report_of_an_unfinished_campaign(darwin: Darwin, tmp_path: Path) -> None:
    refused = darwin("report", begun_campaign(tmp_path), "--json")
    assert refused.code == 2
    assert refused.json["error"] == refused.error


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff", b'{"kind": "asked"}'])
def test_a_damaged_ledger_is_named(
    darwin: Darwin, tmp_path: Path, command: str, damage: bytes
) -> None:
    place = begun_campaign(tmp_path)
    (Path(place) / "ledger" / "00000002.json").write_bytes(damage)
    refused = darwin(command, place)
    assert refused.code == 2
    assert "00000002.json" in refused.error


# -- run -------------------------------------------------------------------------------------


def test_run_refuses_a_campaign_whose_parents_are_not_there(darwin: Darwin, tmp_path: Path) -> None:
    refused = darwin(
        "run", "demo", f"store={tmp_path / 'runs'}", "parents.1.path=nowhere", "--json"
    )
    assert refused.code == 2
    assert "nowhere" in refused.error
    assert refused.json["status"] == "bad input"
    assert not (tmp_path / "runs").exists()


def test_run_refuses_an_override_by_its_key(darwin: Darwin) -> None:
    refused = darwin("run", "demo", "search.evaluation=5")
    assert refused.code == 2
    assert "search.evaluation" in refused.error


# -- how it ends -----------------------------------------------------------------------------


def test_it_says_its_version(darwin: Darwin) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = darwin("--version")
    assert (done.code, done.out, done.err) == (0, f"darwin {project['version']}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_it_shows_its_help(darwin: Darwin, arguments: list[str]) -> None:
    shown = darwin(*arguments)
    assert (shown.code, shown.err) == (0, "")
    for command in ("run", "status", "report", "merge", "inspect"):
        assert command in shown.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["breed"], "breed"),
        (["inspect"], "CHECKPOINT"),
        (["merge", "recipe.yaml"], "OUT"),
        (["inspect", "--jsn", "x"], "--jsn"),
        (["inspect", "x", "y"], "y"),
        (["merge", "recipe.yaml", "out", "--workers", "-1"], "--workers: -1"),
        (["merge", "recipe.yaml", "out", "--workers", "2", "--cpus", "nan"], "--cpus: nan"),
        (["merge", "recipe.yaml", "out", "--workers", "2", "--cpus", "-1"], "--cpus: -1"),
        (
            ["merge", "recipe.yaml", "out", "--placement", "strict"],
            "--placement: is for Ray workers",
        ),
        (["scan", "a", "b", "--workers", "-1"], "--workers: -1"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    darwin: Darwin, arguments: list[str], named: str
) -> None:
    refused = darwin(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert named in refused.error
    with_json = darwin(*arguments, "--json")
    assert with_json.code == 2
    assert with_json.json == {"status": "bad input", "error": with_json.error}


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (StorageError("the store\nis down"), 1, "failed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_command_from_outside_is_one_line_too(
    darwin: Darwin, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, status: str
) -> None:
    def fail(*arguments: str) -> None:
        raise error

    monkeypatch.setattr(single_merge, "merge_recipe", fail)
    ended = darwin("merge", "recipe.yaml", "out", "--json")
    assert ended.code == code
    assert ended.json == {"status": status, "error": ended.error}


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_merge, "merge_recipe", lambda *arguments: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["darwin", "merge", "recipe.yaml", "out"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# -- hostile input ---------------------------------------------------------------------------

COMMANDS = [
    ("inspect", []), ("status", []), ("report", []), ("run", []), ("merge", ["out"]),
]  # fmt: skip

PLACES = [
    "nowhere", "", "binary.yaml", "binary", "folder.yaml", "folder", "s3:/bucket", "file://host/x",
    "ftp://host/x", "shipped:nothing", "shipped:../..", "[/bold]", "a\x1b[2Jb.yaml",
]  # fmt: skip


@pytest.mark.parametrize(("command", "rest"), COMMANDS, ids=[command for command, _ in COMMANDS])
@pytest.mark.parametrize("place", PLACES)
def test_no_place_makes_a_command_stumble(
    darwin: Darwin,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    rest: list[str],
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("binary", "binary.yaml"):
        (tmp_path / name).write_bytes(bytes(range(256)))
    for name in ("folder", "folder.yaml"):
        (tmp_path / name).mkdir()
    refused = darwin(command, place, *rest, "--json")
    assert refused.code == 2
    assert refused.json == {"status": "bad input", "error": refused.json["error"]}
    assert refused.error
    assert not (tmp_path / "out").exists()


CONFIGS = [
    "[]", "5", "{", '{"text_config": "x"}', '{"text_config": {"num_hidden_layers": "4"}}',
    '{"num_hidden_layers": "x"}', '{"model_type": ["x"]}', '{"model_type": null}', "\x00",
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_no_configuration_of_a_parent_makes_a_command_stumble(
    darwin: Darwin, family: list[Path], tmp_path: Path, config: str
) -> None:
    shutil.copytree(family[1], tmp_path / "parent")
    (tmp_path / "parent" / "config.json").write_text(config)
    recipe = write_recipe(tmp_path, [family[0], tmp_path / "parent", family[2]])
    inspected = darwin("inspect", tmp_path / "parent")
    merged = darwin("merge", recipe, tmp_path / "out")
    for ended in (inspected, merged):
        assert ended.code in (0, 2)
        if ended.code:
            assert "config.json" in ended.error


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"[" * 100_000])
def test_a_damaged_file_of_a_parent_is_named(
    darwin: Darwin, family: list[Path], tmp_path: Path, file: str, content: bytes
) -> None:
    shutil.copytree(family[1], tmp_path / "parent")
    (tmp_path / "parent" / file).write_bytes(content)
    recipe = write_recipe(tmp_path, [family[0], tmp_path / "parent", family[2]])
    refused = darwin("merge", recipe, tmp_path / "out")
    assert refused.code == 2
    assert f"{tmp_path / 'parent' / file}: " in refused.error


# -- as a process of its own -----------------------------------------------------------------


def test_the_process_prints_one_object_and_ends_with_the_code(
    family: list[Path], tmp_path: Path
) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments), "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("inspect", family[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["status"] == "done"
    for missing in ("missing.yaml", os.fsdecode(b"caf\xff.yaml")):
        refused = run("merge", tmp_path / missing, tmp_path / "out")
        assert refused.returncode == 2
        error = json.loads(refused.stdout)["error"]
        assert missing in error
        assert refused.stderr == f"darwin: {error}\n".encode(errors="backslashreplace").decode()


# -- scan ------------------------------------------------------------------------------------


def test_scan_prints_a_table_and_keeps_scan_and_page(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    base, father, mother = family
    arguments = ("scan", father, mother, "--base", base, "--out", tmp_path / "out")
    done = darwin(*arguments, "--json")
    assert done.code == 0
    assert done.json["status"] == "done"
    assert done.json["not_finite"] == []
    kept = json.loads(Path(done.json["scan"]).read_text())
    assert kept["format"] == 1
    assert [parent["name"] for parent in kept["parents"]] == ["father", "mother"]
    assert kept["base"]["fingerprint"] == open_checkpoint(str(base)).fingerprint
    assert len(kept["static"]) == len(weights(father))
    assert kept["probe"] == {}
    wanted = sum(tensor.numel() for tensor in weights(father).values())
    assert sum(row["elements"] for row in done.json["components"]) == wanted
    page = Path(done.json["page"])
    first = page.read_bytes()
    # Importance of both, distance to the base of both, and between them.
    assert first.count(b"<svg") == 3
    assert str(father).encode() in first and str(base).encode() in first
    assert b"http://" not in first and b"https://" not in first
    printed = darwin(*arguments)
    assert printed.code == 0
    assert "attention" in printed.out and "base to mother" in printed.out
    assert printed.out.endswith(f"{page}\n")
    assert page.read_bytes() == first


def test_scan_says_what_it_advises_and_that_it_tells_nothing(
    darwin: Darwin, tmp_path: Path
) -> None:
    parents = ("shipped:strings/reverse", "shipped:strings/sort")
    done = darwin("scan", *parents, "--out", tmp_path, "--json")
    told = done.json["advice"]
    assert told["dispersion"] < 0.01 and not told["is_telling"]
    for share in told["shares"].values():
        assert sum(share.values()) == pytest.approx(1.0)
        assert share["mother"] == pytest.approx(0.5, abs=0.01)
    assert "it tells nothing" in darwin("scan", *parents, "--out", tmp_path).out
    assert "advises no shares" in darwin("scan", parents[0], "--out", tmp_path).out


def test_scan_names_tensors_that_are_not_finite(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(family[1], broken)
    file = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(file)
    stored, tensor = next((n, t) for n, t in tensors.items() if t.dim() == 2)
    tensor[0, 1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    done = darwin("scan", family[2], broken, "--out", tmp_path / "out", "--json")
    assert done.code == 0
    (found,) = done.json["not_finite"]
    assert found["of"] == "mother"
    assert stored.endswith(found["tensor"])
    assert (found["nan"], found["inf"]) == (1, 0)
    page = Path(done.json["page"]).read_text()
    assert f"not finite: {found['tensor']} of mother: 1 NaN" in page
    assert "no share can be advised" in done.json["advice"]["problem"]
    assert "Infinity" not in Path(done.json["scan"]).read_text()
    printed = darwin("scan", family[2], broken, "--out", tmp_path / "out")
    assert f"not finite: {found['tensor']} of mother" in printed.out


def test_scan_of_what_is_no_checkpoint(darwin: Darwin, tmp_path: Path) -> None:
    done = darwin("scan", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.code == 2
    assert "nowhere" in done.error
    assert not (tmp_path / "out").exists()


def test_scan_probes_with_sets_of_ones_own(
    darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    """The same, streamed or whole, in spans or shards; the prescription reads what is kept."""
    own = tmp_path / "letters.jsonl"
    own.write_text('{"id": "1", "conditioned": "what is this?", "generic": "who are you then"}\n')
    arguments = ("scan", *family[1:], "--probe", "--set", own)
    done = darwin(*arguments, "--out", tmp_path / "out", "--json")
    assert done.code == 0
    kept = json.loads(Path(done.json["scan"]).read_text())
    assert kept["probe"]["sets"] == {
        "letters": {"prompts": 1, "sha256": hashlib.sha256(own.read_bytes()).hexdigest()}
    }
    rows = kept["probe"]["parents"]["mother"]["letters"]
    layers = max(row["layer"] for row in rows) + 1
    assert len(rows) == 2 * layers
    peak = done.json["probe"]["letters"]["mother"]["mlp"]
    assert peak == max(rows[1::2], key=lambda row: row["mean_token"])
    for number, option in enumerate((["--whole"], ["--spans", 2], ["--shards", 2])):
        other = darwin(*arguments, *option, "--out", tmp_path / str(number), "--json")
        assert json.loads(Path(other.json["scan"]).read_text()) == kept
    tensors = [row["tensor"] for row in kept["static"]]
    advised = prescribe(kept, tensors, alpha=0.0).shares["layers.0.mlp.up_proj.weight"]
    values = [kept["probe"]["parents"][p]["letters"][1]["mean_token"] for p in advised]
    assert list(advised.values()) == pytest.approx([value / sum(values) for value in values])
    printed = darwin(*arguments, "--out", tmp_path / "out")
    assert f"{peak['layer']} ({peak['mean_token']:.3f})" in printed.out
    assert Path(done.json["page"]).read_bytes().count(b"<svg") > 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--set", "math"), "add --probe"),
        (("--probe", "--set", "none"), "no calibration that ships"),
        (("--probe", "--spans", 0), "must be 1 or more"),
        (("--probe", "--spans", 2, "--whole"), "leave out --whole"),
        (("--probe", "--shards", 0), "must be 1 or more"),
        (("--probe", "--shards", 2, "--spans", 2), "leave out --spans"),
    ],
)
def test_scan_with_options_that_contradict(
    options: tuple[object, ...], problem: str, darwin: Darwin, family: list[Path], tmp_path: Path
) -> None:
    refused = darwin("scan", family[1], *options, "--out", tmp_path / "out")
    assert (refused.code, problem in refused.error) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_json_object_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """And one command leaves nothing behind for the next one in the same process."""
    with contextlib.redirect_stdout(io.StringIO()) as output, json_alone():
        print("of a worker that died")
        print_json({"n": 1})
    assert output.getvalue() == '{"n": 1}\n'
    output.close()
    print_json({"n": 2})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ('{"n": 2}\n', "of a worker that died\n")
