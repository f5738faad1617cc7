"""Models as mergekit writes them, dtypes and tables of known keys, made into ours."""

from __future__ import annotations

import os
import re
from typing import Any

from workers.errors import BadInputError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TAKEN_NAMES = ("base", "union", "child")


INSTEAD = {
    "modules": "models of several modules are merged by rules of a recipe file instead",
    "random_seed": "remove it: masks are drawn with seed 0, or with the `seed` of a recipe file, into which "
    "`darwin recipe` converts this one",
}
"""Key of a file -> what to do."""


def check_keys(data: Any, keys: tuple[str, ...], where: str) -> dict[Any, Any]:
    prefix = f"{where}." if where else ""
    if not isinstance(data, dict):
        raise BadInputError(f"{where}: {data!r} is not a table of {', '.join(keys)}")
    for key in data:
        if key not in keys:
            reason = None if where else INSTEAD.get(key)
            raise BadInputError(
                f"{prefix}{key}: is not supported: {reason or 'known are ' + ', '.join(keys)}"
            )
    return data


def nonempty_list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise BadInputError(f"{where}: must be a list of one or more")
    return data


def layer_range(data: Any, where: str) -> tuple[int, int]:
    good = isinstance(data, list) and len(data) == 2 and all(type(n) is int for n in data)
    if not good or not 0 <= data[0] < data[1]:
        raise BadInputError(f"{where}: {data!r} is not [first, end], the end not included")
    return data[0], data[1]


def model_or_none(data: Any, where: str) -> str | None:
    return None if data is None else model_location(data, where)


def model_location(data: Any, where: str) -> str:
    """A location as we write it, of a text PATH[@REVISION][+ADAPTER[@REVISION]] or a table of these."""
    if isinstance(data, dict):
        keys = ("model", "lora", "override_architecture")
        if "path" in data:
            return model_location({"model": data}, where)
        table = check_keys(data, keys, where)
        if table.get("override_architecture") is not None:
            raise BadInputError(f"{where}.override_architecture: is not supported")
        parts = [_path(table.get("model"), f"{where}.model")]
        if table.get("lora") is not None:
            parts.append(_path(table["lora"], f"{where}.lora"))
        return "+".join(parts)
    if not isinstance(data, str) or not data or "\0" in data:
        raise BadInputError(f"{where}: {data!r} is not the place of a model")
    if data.count("+") > 1:
        raise BadInputError(f"{where}: {data!r}: there can be one adapter (MODEL+ADAPTER)")
    return "+".join(_path(part, where) for part in data.split("+"))


def _path(data: Any, where: str) -> str:
    """One side of a model's location; a revision is for ids of the Hugging Face Hub."""
    if isinstance(data, dict):
        table = check_keys(data, ("path", "revision"), where)
        path, revision = table.get("path"), table.get("revision")
    else:
        path, at, revision = data.partition("@") if isinstance(data, str) else (data, "", None)
        revision = revision if at else None
    if not isinstance(path, str) or not path or not isinstance(revision, str | None):
        raise BadInputError(f"{where}: {data!r} is not the place of a model")
    if revision is None:
        return path
    if not revision or not HUB_ID.fullmatch(path) or os.path.exists(path):
        raise BadInputError(
            f"{where}: {data!r}: a revision is for a model on the Hugging Face Hub, ORG/NAME@REVISION"
        )
    return f"hf://{path}@{revision}"


def output_dtype(data: dict[Any, Any]) -> str | None:
    found = None
    for key in ("dtype", "out_dtype"):
        value = data.get(key)
        if value is None:
            continue
        name = value.removeprefix("torch.") if isinstance(value, str) else None
        if name not in DTYPES:
            raise BadInputError(f"{key}: {value!r} is none of {', '.join(DTYPES)}")
        found = DTYPES[name]
    return found


def short_names(places: list[str]) -> dict[str, str]:
    """Location -> a short name of its own, from the last parts of the path."""
    names: dict[str, str] = {}
    for place in dict.fromkeys(places):
        parts = [
            re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.")
            for part in re.sub(r"@[^/+]*", "", place.partition("://")[2] or place)
            .replace("+", "/+")
            .split("/")
        ]
        parts = [part for part in parts if part] or ["model"]
        candidates = ["-".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        candidates += [f"{parts[-1]}-{n}" for n in range(2, len(places) + 3)]
        taken = (*names.values(), *TAKEN_NAMES)
        names[place] = next(name for name in candidates if name not in taken)
    return names
