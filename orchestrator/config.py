"""The campaign's configuration: typed, checked without torch, unknown keys are errors.

Paths are taken as in the shell that starts `darwin`: plain (relative to the current folder), `file://`,
`s3://`, or `shipped:NAME` for what comes with the package. Names of genome spaces and tasks are
names of files in `conf/genome` and `conf/task`, or paths of one's own.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.jobs.driver_config import DriverConfig
from orchestrator.racing_config import RacingConfig
from orchestrator.watching_config import CostConfig
from orchestrator.workers_config import WorkersConfig
from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError, open_store

SHIPPED = Path(__file__).resolve().parent.parent / "conf"

OPERATIONAL_KEYS = (
    "store", "address", "workers.count", "workers.cpus", "workers.gpus", "workers.placement",
    "workers.gang", "workers.memory", "workers.resources", "workers.pools", "priority", "engine.canary",
    "driver", "cost", "log",
)  # fmt: skip
"""Keys that may change when a campaign is resumed: they cannot change its result."""

GATES = ("finite", "different", "changed", "perplexity", "repetition", "endings", "layers")
"""What is checked before a child is published."""

MATCHINGS = ("none", "weights", "outputs")
"""What experts can be matched by."""


@dataclass
class ParentConfig:
    """One parent. The first of the list is the father: the child has its layout and tokenizer."""

    name: str = MISSING
    path: str = MISSING
    hub: str | None = None
    """Its id on the Hugging Face Hub, for the child's model card."""


@dataclass
class GeneBounds:
    """Bounds of one family of genes and the value that the search starts from."""

    low: float = MISSING
    high: float = MISSING
    start: float = MISSING


@dataclass
class GenomeConfig:
    """The genome space and the merge method whose parameters it searches."""

    space: str = "components"
    method: str = "task_arithmetic"
    genes: dict[str, GeneBounds] = field(default_factory=dict)
    """Overrides of the space's bounds, by parameter name."""
    start: str | None = None
    """One of the starts that a ratio space names; None is where its genes start by themselves."""
    blocks: int | None = None
    """Layer blocks of each group that the space cuts into blocks; None is the space's own number."""
    allow_degenerate: bool = False
    """Whether the method may run though too few parents differ from the base for it to mean anything."""


@dataclass
class ScanConfig:
    """The model MRI: what is measured of the parents before a search whose genome space asks for it."""

    static: bool = True
    """Statistics of the weights."""
    probe: bool = False
    """Activations on calibration prompts."""
    sets: list[str] = field(default_factory=list)
    """Sets of prompts; none named: those that ship."""
    alpha: float = 0.5
    """Weight of the static part where both are measured; the probe's is what is left to 1."""

    @property
    def scans(self) -> bool:
        return self.static or self.probe


@dataclass
class ExpertsConfig:
    """Mixtures of experts whose donors may have their experts under other numbers than the father."""

    match: str = "none"
    """Whether they are matched before the search, and by what: `none`, `weights` or `outputs`."""
    sets: list[str] = field(default_factory=list)
    """Sets of prompts for a matching by outputs; none named: those that ship."""


@dataclass
class SearchConfig:
    """The optimizer and its budget."""

    optimizer: str = "cma_es"
    evaluations: int = 200
    """Candidates that are scored, exactly; parents are not counted."""
    population: int | None = None
    """Candidates of a generation; None leaves it to the optimizer."""
    step: float = 0.25
    """First standard deviation, as a share of each gene's range."""


@dataclass
class BreedingConfig:
    """Rounds of breeding: the best children of one search are the parents of the next."""

    rounds: int = 1
    """Searches, one after the other; 1 is a campaign without breeding."""
    survivors: int = 2
    """Children of a round that are the parents of the next."""


@dataclass
class TaskConfig:
    """A task of the campaign and how many of its items are used."""

    name: str = MISSING
    search_items: int | None = None
    """The first so many; None is all."""
    holdout_items: int | None = None
    weight: float | None = None
    """Its share of a `weighted` objective, beside the other tasks' weights; None is 1."""


OWN_VLLM_ARGUMENTS = ("model", "dtype", "tokenizer", "worker_cls", "worker_extension_cls")


@dataclass
class EngineConfig:
    """How candidates are run."""

    kind: str = "transformers"
    """`transformers`, or `vllm` with the extra of that name."""
    dtype: str = "auto"
    """The dtype that the live model computes in; auto is the checkpoint's."""
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 32
    """Texts that a worker reads or writes at once."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Arguments of `vllm.LLM`: tensor_parallel_size, enable_expert_parallel, max_model_len, ..."""
    canary: int = 1
    """Every how many candidates the live model of an engine that converts weights (vllm) is compared with
    transformers; 0: only at the start."""


@dataclass
class HealthConfig:
    """What a child must be like to be published; all of it may change when a campaign is resumed."""

    text: str | None = None
    """A text file, its texts separated by blank lines; `tasks` for search items; None is the shipped one."""
    prompts: int = 16
    """Search prompts that child and parents go on from."""
    new_tokens: int = 64
    """The most tokens of each, unless the task has fewer."""
    perplexity: float = 1.5
    """The child's may be so many times the worst parent's."""
    repetition: float = 0.25
    """The child may loop on this share of the prompts more than the worst parent."""
    endings: float = 0.25
    """The same for generations that the token limit has cut."""
    difference: float = 0.001
    """The share of a component that must differ from a parent by more than rounding."""
    interference: float = 2.0
    """A layer's output may be so many times as far from the parents' as these are from each other."""
    function_loss: float = 0.5
    """A layer must add this share of what it adds in the parent where that is least."""
    allow: list[str] = field(default_factory=list)
    """Gates that do not keep a child from being published; the card says so."""


@dataclass
class CampaignConfig:
    """One campaign."""

    name: str = MISSING
    parents: list[ParentConfig] = MISSING
    tasks: list[TaskConfig] = MISSING
    store: str = "runs"
    """Where campaigns are kept; this one in the folder `name` of it."""
    base: str | None = None
    """The parents' common ancestor, for methods that merge differences to it."""
    genome: GenomeConfig = field(default_factory=GenomeConfig)
    scan: ScanConfig = field(default_factory=ScanConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    racing: RacingConfig = field(default_factory=RacingConfig)
    breeding: BreedingConfig = field(default_factory=BreedingConfig)
    objective: str = "mean"
    """The aim: the tasks' `mean`, the `worst` of them, their `weighted` mean, or a `pareto` front."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    driver: DriverConfig = field(default_factory=DriverConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    address: str | None = None
    """A running Ray cluster (`auto` or `host:port`); None starts Ray on this machine."""
    priority: int = 0
    """Where workers wait for room in a cluster that campaigns share, those with lower ones make room."""
    cost: CostConfig = field(default_factory=CostConfig)
    log: str = "text"
    """What `darwin run` writes to standard error: `text`, or `json` lines."""
    seed: int = 0


def load_config(path: str, overrides: list[str] | None = None) -> CampaignConfig:
    """The campaign of a YAML file (or of a name in `conf/campaign`), with `key=value` overrides.

    Raises `BadInputError` naming the file and the key.
    """
    file = find_shipped("campaign", path)
    with _naming(str(file)):
        data = OmegaConf.load(file)
    if not isinstance(data, DictConfig):
        raise BadInputError(f"{file}: not a campaign: it has no keys")
    merged = OmegaConf.structured(CampaignConfig)
    for key in data:
        with _naming(str(file), str(key)):
            merged = OmegaConf.merge(merged, OmegaConf.masked_copy(data, [key]))
    return _finished(merged, overrides or [], str(file))


def override_config(config: CampaignConfig, overrides: list[str], where: str) -> CampaignConfig:
    """A campaign with `key=value` overrides, checked again; errors name `where` it is from."""
    return _finished(OmegaConf.structured(config), overrides, where)


def _finished(merged: Any, overrides: list[str], where: str) -> CampaignConfig:
    # Not above: it checks what is defined here.
    from orchestrator.config_checks import check_values

    for override in overrides:
        merged = _override(merged, override)
    with _naming(where):
        missing = sorted(OmegaConf.missing_keys(merged))
        config = None if missing else OmegaConf.to_object(merged)
    if missing:
        raise BadInputError(f"{where}: the key {missing[0]!r} is missing")
    assert isinstance(config, CampaignConfig)
    check_values(config, where)
    return config


def _override(config: Any, override: str) -> Any:
    """The configuration with one `key=value` applied; the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals:
        raise BadInputError(f"{override!r} is not key=value")
    with _naming(override):
        if re.search(r"\[|(^|\.)\d", key):  # an item of a list: a merge would replace the list
            OmegaConf.update(config, key, yaml.safe_load(value), merge=True)
            return config
        return OmegaConf.merge(config, OmegaConf.from_dotlist([override]))


def config_from_dict(
    data: dict[str, Any], where: str = "the recorded configuration"
) -> CampaignConfig:
    """A configuration that `config_to_dict` wrote; errors say `where` it is from."""
    with _naming(where):
        config = OmegaConf.to_object(
            OmegaConf.merge(
                OmegaConf.structured(CampaignConfig),
                OmegaConf.create(escape_interpolations(data)),
            )
        )
    assert isinstance(config, CampaignConfig)
    return config


def escape_interpolations(data: Any) -> Any:
    """What a configuration held, as it must be written to be read so again: what looks like an interpolation
    in its texts was resolved, or escaped, when they were read."""
    if isinstance(data, dict):
        return {key: escape_interpolations(value) for key, value in data.items()}
    if isinstance(data, list):
        return [escape_interpolations(value) for value in data]
    if isinstance(data, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", data)
    return data


def config_to_dict(config: CampaignConfig) -> dict[str, Any]:
    """Plain data of a configuration."""
    return asdict(config)


def find_shipped(kind: str, name: str, suffixes: tuple[str, ...] = (".yaml", ".yml")) -> Path:
    """The file that `name` means: one's own (a path, `file://`, `s3://`), or a name in `conf/KIND`.

    A file of one's own is told from a name by its suffix; the first of `suffixes` is what ships. A file in
    a bucket is copied to this machine first, for as long as the process lives.
    """
    if "://" in name:
        return _fetch(name)
    own = Path(os.path.expanduser(name))
    if own.suffix in suffixes:
        if not own.is_file():
            raise BadInputError(f"there is no file {name}")
        return own
    shipped = SHIPPED / kind / f"{name}{suffixes[0]}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not shipped.is_file():
        known = ", ".join(sorted(path.stem for path in (SHIPPED / kind).glob(f"*{suffixes[0]}")))
        raise BadInputError(
            f"{name!r} is no {kind} that ships ({known}); a {kind} of one's own is given as the path "
            f"of its {suffixes[0]} file"
        )
    return shipped


@cache
def _fetched() -> tempfile.TemporaryDirectory[str]:
    """The folder of copies; it goes when the process does."""
    return tempfile.TemporaryDirectory(prefix="darwin-")


def _fetch(location: str) -> Path:
    folder, _, file = location.rpartition("/")
    store = open_store(folder)
    try:
        content = store.read(file)
    except ObjectNotFoundError as error:
        raise BadInputError(f"there is no file {location}") from error
    path = store.local_path(file)
    if path is None:
        path = Path(tempfile.mkdtemp(dir=_fetched().name)) / file
        path.write_bytes(content)
    return path


def read_yaml(file: Path) -> Any:
    """What a YAML file of one's own holds. Raises `BadInputError` naming the file."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: not UTF-8, or a date that no calendar has.
        raise BadInputError(f"{file}: not valid YAML ({_first_line(error)})") from error


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that stands twice in a table the last would count, unsaid."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: the key {key.value!r} stands twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def engine_settings(engine: EngineConfig) -> dict[str, Any]:
    """What a worker builds its engine from: its kind if it is not transformers, and that one's arguments."""
    if engine.kind == "vllm":
        return {
            "kind": engine.kind,
            "dtype": engine.dtype,
            "options": engine.vllm,
            "canary": engine.canary,
        }
    return {
        "dtype": engine.dtype,
        "device": engine.device,
        "threads": engine.threads,
        "batch_size": engine.batch_size,
    }


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two plain configurations."""
    one, two = _flatten(old), _flatten(new)
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict) and data:
        return {
            k: v
            for key, value in data.items()
            for k, v in _flatten(value, f"{prefix}{key}.").items()
        }
    if isinstance(data, list) and data:
        return {
            k: v
            for n, value in enumerate(data)
            for k, v in _flatten(value, f"{prefix}{n}.").items()
        }
    return {prefix[:-1]: data}


@contextmanager
def _naming(where: str, within: str = "") -> Iterator[None]:
    """Turn what OmegaConf and YAML raise into a `BadInputError` that names `where` and the key.

    OmegaConf does not always know the whole key: it lies in the key `within`.
    """
    try:
        yield
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError, OSError, IndexError, TypeError,
            ValueError, OverflowError) as error:  # fmt: skip
        key = getattr(error, "full_key", None) or within
        if not key.startswith(within):
            key = f"{within}.{key}"
        raise BadInputError(f"{where}: {f'{key}: ' if key else ''}{_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split("\n    full_key")[0].split())
    # OmegaConf names our classes.
    return re.sub(r"^Key '(.+)' not in '\w+'$", r"there is no key \1", text)
