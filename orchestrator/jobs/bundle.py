"""What a submitted campaign takes along: its configuration in one file, its own small files, the code.

A place is made absolute and has to mean the same on the nodes. Files that only the driver reads (tasks and
their items, a genome space, calibration sets, the text of the health check) go along if they are given
relative to the current folder and lie in it, under the same names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config import (
    CampaignConfig,
    config_to_dict,
    escape_interpolations,
    find_shipped,
    read_yaml,
)
from workers.checkpoints.opening import split_adapter
from workers.errors import BadInputError
from workers.storage.hub import HUB_SCHEME, is_hub_id
from workers.storage.locations import absolute_location

CAMPAIGN_FILE = "campaign.yaml"
CODE = ("orchestrator", "workers", "conf")
CODE_FOLDER = Path(__file__).resolve().parent.parent.parent
FAMILIES = Path("workers/families")
SHIPPED = "shipped:"
"""Models that ship; a job takes them along only if its campaign names one."""

MOST_BYTES = 200_000_000
"""Of own files: a cluster keeps what jobs bring along in its head's memory."""


@dataclass(frozen=True)
class Bundle:
    """A campaign that another machine can run."""

    config: CampaignConfig
    files: dict[str, Path] = field(default_factory=dict)
    """Name in the job's folder -> the file here."""

    @property
    def text(self) -> str:
        """The campaign file of the job."""
        data = config_to_dict(self.config)
        return yaml.safe_dump(escape_interpolations(data), sort_keys=False, allow_unicode=True)

    @property
    def names_shipped(self) -> bool:
        """Whether models, or items of tasks, are those that come with the package."""
        tasks = [task.name for task in self.config.tasks]
        return any(SHIPPED in text for text in (self.text, *map(_text_of_task, tasks)))

    @property
    def left_on_nodes(self) -> list[str]:
        """The places that every node must have itself, with the same content."""
        config = self.config
        places = [config.store, *(parent.path for parent in config.parents), config.base or ""]
        places += [task.name for task in config.tasks] + [config.genome.space]
        places += [*config.scan.sets, *config.experts.sets, config.health.text or ""]
        return [place for place in places if os.path.isabs(place)]

    def write(self, folder: Path, with_code: bool) -> None:
        """Write everything to an empty folder. Raises `BadInputError` for files of one name."""
        if with_code:
            copy_code(folder, self.names_shipped)
        (folder / CAMPAIGN_FILE).write_text(self.text, encoding="utf-8")
        for name, file in self.files.items():
            target = folder / name
            if target.exists() and target.read_bytes() != file.read_bytes():
                raise BadInputError(
                    f"{file}: a file of Darwin's own has this name in the job; rename it"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def bundle_campaign(config: CampaignConfig) -> Bundle:
    """The campaign as other machines can run it. Raises `BadInputError` for what cannot go along."""
    files: dict[str, Path] = {}
    config = replace(
        config,
        store=absolute_location(config.store),
        address=None,
        parents=[replace(parent, path=absolute_place(parent.path)) for parent in config.parents],
        base=absolute_place(config.base) if config.base else None,
        tasks=[
            replace(task, name=_own_file(task.name, (".yaml", ".yml"), files))
            for task in config.tasks
        ],
        genome=replace(
            config.genome, space=_own_file(config.genome.space, (".yaml", ".yml"), files)
        ),
        scan=replace(
            config.scan, sets=[_own_file(name, (".jsonl",), files) for name in config.scan.sets]
        ),
        experts=replace(
            config.experts,
            sets=[_own_file(name, (".jsonl",), files) for name in config.experts.sets],
        ),
        health=replace(config.health, text=_health_text(config.health.text, files)),
    )
    for task in config.tasks:
        if task.name.endswith((".yaml", ".yml")) and os.path.isfile(task.name):
            _take_items(task.name, files)
    size = sum(file.stat().st_size for file in files.values())
    if size > MOST_BYTES:
        raise BadInputError(
            f"the campaign's own files have {size:,} bytes, of which {MOST_BYTES:,} can go along with a job: "
            "put them into a bucket (s3://...), or where every node has them, and give absolute paths"
        )
    return Bundle(config, files)


def absolute_place(location: str) -> str:
    """A parent's place as another machine can look it up."""
    sides = split_adapter(location)
    if sides is not None:
        return f"{absolute_place(sides[0])}+{absolute_place(sides[1])}"
    if is_hub_id(location) and not os.path.lexists(location.split("/")[0]):
        return f"{HUB_SCHEME}{location}"
    if location.lower().startswith(HUB_SCHEME):
        return location  # which commit that is, the driver looks up
    return absolute_location(location)


def copy_code(folder: Path, with_families: bool) -> None:
    """The packages of this installation, without caches."""

    def left_out(path: str, names: list[str]) -> set[str]:
        own = {name for name in names if name == "__pycache__" or name.endswith((".pyc", ".pyo"))}
        if not with_families and Path(path) == CODE_FOLDER / FAMILIES:
            own |= {name for name in names if (Path(path) / name).is_dir()}
        return own

    for package in CODE:
        shutil.copytree(CODE_FOLDER / package, folder / package, ignore=left_out)


def _own_file(name: str, suffixes: tuple[str, ...], files: dict[str, Path]) -> str:
    """The name under which the job finds a file; one that ships, or lies in a bucket, stays as it is."""
    if _is_place(name) or not name.endswith(suffixes):
        return name
    return _take(name, files)


def _health_text(text: str | None, files: dict[str, Path]) -> str | None:
    if text is None or text == "tasks" or _is_place(text):
        return text
    return _take(text, files)


def _take(name: str, files: dict[str, Path]) -> str:
    inside = _inside(name)
    if inside is None:
        return os.path.abspath(os.path.expanduser(name))
    if not os.path.isfile(inside):
        raise BadInputError(f"there is no file {name}")
    files[inside] = Path(inside).absolute()
    return inside


def _inside(name: str) -> str | None:
    """A path relative to the current folder, in it; None if it leads elsewhere."""
    path = os.path.normpath(os.path.expanduser(name))
    return None if os.path.isabs(path) or path.split(os.sep)[0] == ".." else path


def _take_items(task_file: str, files: dict[str, Path]) -> None:
    """What a task file names, which is looked for from the folder that the driver is started in."""
    for place in _places_in(read_yaml(Path(task_file))):
        if _is_place(place) or os.path.isabs(os.path.expanduser(place)):
            continue
        inside = _inside(place)
        if inside is None or not os.path.exists(inside):
            raise BadInputError(
                f"{task_file}: {place} is not in the current folder, so it cannot go along with the job: "
                "start darwin in a folder that holds it, or give an absolute path that the nodes have"
            )
        for file in _files_under(Path(inside)):
            files[file.as_posix()] = file.absolute()


def _is_place(name: str) -> bool:
    """Whether it means the same everywhere."""
    return "://" in name or name.startswith(SHIPPED)


def _text_of_task(name: str) -> str:
    try:
        return find_shipped("task", name).read_text(encoding="utf-8")
    except (BadInputError, OSError, UnicodeDecodeError):
        return ""  # not here; the driver will tell


def _places_in(task: Any) -> Iterator[str]:
    """The places of files, or of a folder, in the content of a task file."""
    task = task if isinstance(task, dict) else {}
    source = task.get("source")
    source = source if isinstance(source, dict) else {}
    for named in (task.get("items"), source.get("files")):
        for value in named.values() if isinstance(named, dict) else ():
            yield from (
                place
                for place in (value if isinstance(value, list) else [value])
                if isinstance(place, str) and place
            )
    if isinstance(source.get("include_path"), str):
        yield source["include_path"]


def _files_under(path: Path) -> Iterator[Path]:
    yield from (
        (file for file in sorted(path.rglob("*")) if file.is_file()) if path.is_dir() else [path]
    )
