"""The campaign's configuration: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config import (
    OPERATIONAL_KEYS,
    CampaignConfig,
    config_from_dict,
    config_to_dict,
    differing_keys,
    find_shipped,
    load_config,
    read_yaml,
)
from tests.campaigns import write_campaign
from workers.errors import BadInputError

SMALLEST: dict[str, Any] = {
    "name": "x",
    "parents": [{"name": "a", "path": "one"}, {"name": "b", "path": "two"}],
    "tasks": [{"name": "t.yaml"}],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "campaign.yaml"


def load(file: Path, *overrides: str, **changes: Any) -> CampaignConfig:
    """The smallest campaign with top-level keys changed (`None` removes one)."""
    data = {key: value for key, value in (SMALLEST | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(data))
    return load_config(str(file), list(overrides))


def refusal(file: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(BadInputError) as caught:
        load(file, *overrides, **changes)
    return str(caught.value)


def value_at(config: CampaignConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


# -- what is read ----------------------------------------------------------------------------


def test_what_is_not_given_has_its_default(file: Path) -> None:
    config = load(file)
    defaults = CampaignConfig(name="x", parents=config.parents, tasks=config.tasks)
    assert config == defaults
    assert [(parent.name, parent.path) for parent in config.parents] == [("a", "one"), ("b", "two")]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=other", "name", "other"),
        ("name=2024-01-31", "name", "2024-01-31"),
        ("seed=7", "seed", 7),
        ("base=s3://bucket/base", "base", "s3://bucket/base"),
        ("base=a=b", "base", "a=b"),
        ("base=null", "base", None),
        ("base=", "base", None),
        ("search.population=6", "search.population", 6),
        ("search.population=null", "search.population", None),
        ("search.step=1e-1", "search.step", 0.1),
        ("search.step=1", "search.step", 1.0),
        ("search={evaluations: 7}", "search.evaluations", 7),
        ("search={evaluations: 7}", "search.optimizer", "random"),
        ("parents.0.path=three", "parents.0.path", "three"),
        ("parents.1.name=c", "parents.1.name", "c"),
        ("parents.0.hub=null", "parents.0.hub", None),
        ("parents[1].hub=me/it", "parents.1.hub", "me/it"),
        ("parents.0.path=three", "parents.1.path", "two"),
        ("tasks.0.search_items=5", "tasks.0.search_items", 5),
        ("tasks=[{name: u}, {name: v}]", "tasks.1.name", "v"),
        ("workers.gpus=0.5", "workers.gpus", 0.5),
        ("genome.blocks=3", "genome.blocks", 3),
    ],
)
def test_an_override_replaces_one_value(file: Path, override: str, key: str, value: Any) -> None:
    config = load(file, override, search={"optimizer": "random"}, base="before")
    found = value_at(config, key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_of_a_key_counts(file: Path) -> None:
    assert load(file, "seed=1", "seed=2", seed=3).seed == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["genome.genes.weight={low: 0, high: 2, start: 0.5}"],
        ["genome.genes={weight: {low: 0, high: 2, start: 0.5}}"],
        ["genome.genes.weight.low=0", "genome.genes.weight={high: 2, start: 0.5}"],
    ],
)
def test_the_bounds_of_genes_can_be_given_as_overrides(file: Path, overrides: list[str]) -> None:
    (name, bounds), *others = load(file, *overrides).genome.genes.items()
    assert (name, bounds.low, bounds.high, bounds.start) == ("weight", 0.0, 2.0, 0.5)
    assert others == []


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sede": 1}, "sede"),
        ({"search": {"evaluation": 5}}, "search.evaluation"),
        ({"engine": {"dtyp": "auto"}}, "engine.dtyp"),
        ({"genome": {"genes": {"weight": {"lowest": 1}}}}, "genome.genes.weight.lowest"),
        ({"health": {"perplexitty": 2}}, "health.perplexitty"),
        ({"parents": [{"name": "a", "path": "one", "pth": "two"}]}, "parents.pth"),
        ({"tasks": [{"name": "t", "items": 4}]}, "tasks.items"),
        ({1: 2}, "1"),
    ],
)
def test_an_unknown_key_is_refused_with_file_and_key(
    file: Path, changes: dict[Any, Any], named: str
) -> None:
    file.write_text(yaml.safe_dump(SMALLEST | changes))
    with pytest.raises(BadInputError) as caught:
        load_config(str(file))
    assert str(caught.value).startswith(f"{file}: {named}")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "llama.cpp"}, "engine.kind"),
        ({"vllm": {"max_model_len": 8}}, "engine.vllm"),
        (
            {"kind": "vllm", "vllm": {"worker_extension_cls": "x"}},
            "engine.vllm.worker_extension_cls",
        ),
    ],
)
def test_an_engine_that_cannot_be_is_refused(
    file: Path, changes: dict[str, Any], named: str
) -> None:
    file.write_text(yaml.safe_dump(SMALLEST | {"engine": changes}))
    with pytest.raises(BadInputError, match=re.escape(f"{file}: {named}: ")):
        load_config(str(file))


@pytest.mark.parametrize(
    "key", ["nope", "search.nope", "parents.0.nope", "genome.genes.weight.nope"]
)
def test_an_unknown_key_of_an_override_is_refused(file: Path, key: str) -> None:
    message = refusal(file, f"{key}=1")
    assert message.startswith(f"{key}=1: ")
    assert "nope" in message.removeprefix(f"{key}=1: ")


@pytest.mark.parametrize(
    "override",
    ["nothing", "=5", "parents.7.path=x", "parents.x.path=1", "base=[", "search..step=1"],
)
def test_a_malformed_override_is_refused_by_itself(file: Path, override: str) -> None:
    assert override in refusal(file, override)


@pytest.mark.parametrize("key", ["name", "parents", "tasks"])
def test_a_missing_key_is_named(file: Path, key: str) -> None:
    assert refusal(file, **{key: None}) == f"{file}: the key {key!r} is missing"


def test_a_missing_key_inside_a_list_is_named(file: Path) -> None:
    message = refusal(file, parents=[{"name": "a", "path": "one"}, {"name": "b"}])
    assert message == f"{file}: the key 'parents[1].path' is missing"
    assert "genome.genes.weight.high" in refusal(file, "genome.genes.weight.low=1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search.evaluations", "many"),
        ("search.evaluations", "1.5"),
        ("search.evaluations", "0"),
        ("search.evaluations", "true"),
        ("search.population", "-1"),
        ("search.step", "0"),
        ("search.step", ".nan"),
        ("search.step", ".inf"),
        ("seed", "-1"),
        ("seed", "0.5"),
        ("genome.blocks", "0"),
        ("tasks.0.search_items", "0"),
        ("tasks.0.holdout_items", "-3"),
        ("engine.threads", "0"),
        ("engine.batch_size", "0"),
        ("engine.device", "gpu"),
        ("engine.device", "cuda:x"),
        ("engine.dtype", "int8"),
        ("workers.count", "0"),
        ("workers.cpus", "-1"),
        ("workers.cpus", ".nan"),
        ("workers.gpus", ".inf"),
        ("workers.gpus", "1.5"),
        ("workers.gang", "0"),
        ("workers.memory", "-1"),
        ("workers.resources", "{CPU: 1}"),
        ("workers.resources.tpu", "-1"),
        ("workers.pools.0.count", "0"),
        ("workers.pools.0.gpus", "1.5"),
        ("workers.pools.0.resources", "{memory: 1}"),
        ("objective", "median"),
        ("health.prompts", "0"),
        ("health.new_tokens", "0"),
        ("health.perplexity", "0"),
        ("health.perplexity", ".inf"),
        ("health.interference", ".nan"),
        ("health.repetition", "1.5"),
        ("health.endings", "-0.1"),
        ("health.difference", ".nan"),
        ("health.function_loss", "2"),
        ("health.allow", "[perplexity, beauty]"),
        ("name", "../up"),
        ("name", ".hidden"),
        ("name", "a b"),
        ("parents.0.name", "b"),
        ("parents.0.name", "base"),
        ("parents.0.name", "child"),
        ("parents.0.name", "a|b"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(file: Path, key: str, value: str) -> None:
    named = "parents" if key.startswith("parents") else key
    message = refusal(file, f"{key}={value}", workers={"pools": [{"count": 1}]})
    assert f"{named}: " in message
    assert "\n" not in message


def test_a_bad_value_of_the_file_is_refused_with_file_and_key(file: Path) -> None:
    message = refusal(file, search={"evaluations": "many"})
    assert message.startswith(f"{file}: search.evaluations: ")


@pytest.mark.parametrize("key", ["search", "parents", "tasks", "engine", "genome"])
@pytest.mark.parametrize("value", [5, "text", [1], {"a": "b"}])
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(
    file: Path, key: str, value: Any
) -> None:
    assert refusal(file, **{key: value}).startswith(f"{file}: {key}")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"parents": SMALLEST["parents"][:1]}, "parents"),
        ({"parents": [{"name": "a", "path": "one"}, {"name": "a", "path": "two"}]}, "parents"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"name": "here/t.yaml"}, {"name": "there/t.yaml"}]}, "tasks"),
    ],
)
def test_lists_need_enough_and_different_names(
    file: Path, changes: dict[str, Any], key: str
) -> None:
    assert refusal(file, **changes).startswith(f"{file}: {key}: ")


HOSTILE = {
    "binary": bytes(range(256)),
    "control characters": b"\x00\x01\x02",
    "a list": b"[1, 2]",
    "a text": b"hello",
    "a number": b"5",
    "deep": b"base: " + b"[" * 600 + b"]" * 600,
    "a broken line": b"name: [",
    "a double key": b"name: x\nname: y\n",
    "an object": b"name: !!python/object/apply:os.system ['exit 1']",
    "an open reference": b"name: ${nothing}",
    "half a reference": b"name: ${",
    "no key": b"null: 5",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_campaign_is_refused_by_its_file(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        load_config(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


# -- files -----------------------------------------------------------------------------------


def test_a_name_means_what_ships_and_a_yaml_path_ones_own(file: Path) -> None:
    assert find_shipped("campaign", "demo").read_text().startswith("# The demo")
    file.write_text("")
    assert find_shipped("task", str(file)) == file


@pytest.mark.parametrize("name", ["nope", "", "../campaign/demo", "demo.json", "a\0b"])
def test_a_name_that_does_not_ship_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(BadInputError, match="demo"):
        find_shipped("campaign", name)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("folder.yaml", "missing.yml"):
        with pytest.raises(BadInputError, match=name):
            find_shipped("task", str(tmp_path / name))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a: [", b"a: 2024-99-99", b"[" * 600 + b"]" * 600]
)
def test_yaml_that_cannot_be_read_is_refused_by_its_file(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


# -- workers ---------------------------------------------------------------------------------


def test_what_a_further_pool_does_not_say_is_as_for_the_first_workers(file: Path) -> None:
    first = {"count": 2, "cpus": 3, "gpus": 1, "memory": 1.5, "resources": {"fast": 1}}
    pools = [{"count": 1, "gpus": 0.5}, {"count": 3, "cpus": 8, "gpus": 0, "resources": {}}]
    workers = load(file, workers=first | {"pools": pools}).workers
    assert workers.total == 6
    needs = [workers.places[number] for number in (0, 1, 2, 3)]
    one = {"CPU": 3, "GPU": 1, "memory": 1.5e9, "fast": 1}
    assert [place.bundle for place in needs] == [
        one, one, one | {"GPU": 0.5}, {"CPU": 8, "memory": 1.5e9},
    ]  # fmt: skip
    assert [place.threads for place in needs] == [3, 3, 3, 8]
    assert str(needs[0]) == "3 CPUs, 1 GPUs, 1.5 GB of memory and 1 fast"
    own = needs[0].options
    assert own == {"num_cpus": 3, "num_gpus": 1, "memory": 1_500_000_000, "resources": {"fast": 1}}


# -- plain data ------------------------------------------------------------------------------


def test_plain_data_makes_the_same_configuration_again(file: Path) -> None:
    config = load(
        file,
        "genome.genes.weight={low: 0, high: 2, start: 0.5}",
        "search.population=5",
        "parents.0.hub=me/a",
        "workers.gpus=0.25",
        "workers.resources={fast: 2}",
        "workers.pools=[{count: 2, memory: 3, resources: {slow: 0.5}}]",
    )
    data = config_to_dict(config)
    assert data == dataclasses.asdict(config)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(data))) == config


@pytest.mark.parametrize("text", ["${x}", "a ${b.c} d", r"\${x}", r"\\${x}", "${", "{{ x }}\\n"])
def test_a_text_that_looks_like_an_interpolation_is_read_as_it_was_recorded(
    file: Path, text: str
) -> None:
    """It was escaped in the campaign file; a chat template may well have one."""
    config = load(file)
    config.engine.kind, config.engine.vllm = "vllm", {"chat_template": text}
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("key", ["tasks.0.weight", "search.step", "racing.growth"])
def test_a_number_that_no_float_can_hold_is_refused(file: Path, key: str) -> None:
    assert key in refusal(file, f"{key}={'9' * 400}")


def test_a_recorded_configuration_of_another_version_is_refused(file: Path) -> None:
    data = config_to_dict(load(file)) | {"from_the_future": 1}
    with pytest.raises(BadInputError, match="from_the_future"):
        config_from_dict(data)


def test_operational_keys_exist(file: Path) -> None:
    config = load(file)
    for key in OPERATIONAL_KEYS:
        value_at(config, key)


@pytest.mark.parametrize(
    ("old", "new", "different"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 2]}, "a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a"]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c"]),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, ["a.1.b"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a.1"]),
        ({"a": {}}, {"a": []}, ["a"]),
        ({"a": {"b": 1}}, {"a": {}}, ["a", "a.b"]),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ["a", "b"]),
    ],
)
def test_differing_keys_are_named_with_dots(
    old: dict[str, Any], new: dict[str, Any], different: list[str]
) -> None:
    assert differing_keys(old, new) == different
    assert differing_keys(new, old) == different


# -- quick to import -------------------------------------------------------------------------


def test_neither_the_command_line_nor_a_configuration_imports_what_is_slow() -> None:
    program = (
        "import sys\n"
        "import orchestrator.cli, orchestrator.campaign, workers.evaluation_worker\n"
        "from orchestrator.config import load_config\n"
        "load_config('demo', ['seed=1'])\n"
        "slow = {'torch', 'ray', 'transformers', 'scipy', 'matplotlib'}\n"
        "print(sorted(slow & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_file_of_ones_own_may_be_a_location(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("kind: x\n")
    assert find_shipped("task", f"file://{tmp_path}/t.yaml") == tmp_path / "t.yaml"
    for location in (f"file://{tmp_path}/u.yaml", f"file://{tmp_path}/none/t.yaml"):
        with pytest.raises(BadInputError, match="there is no file"):
            find_shipped("task", location)
    with pytest.raises(BadInputError, match="gopher"):
        find_shipped("task", "gopher://x/t.yaml")


def test_sets_without_a_probe_are_refused(tmp_path: Path) -> None:
    file = write_campaign(tmp_path, scan={"sets": ["strings_sort"]})
    with pytest.raises(BadInputError, match=r"scan\.sets: is for a probe: set scan\.probe to true"):
        load_config(str(file))
