"""Open what a user names: a checkpoint, or a base with a LoRA adapter as `BASE+ADAPTER`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from workers.checkpoints.adapter import CONFIG_FILE, open_adapter
from workers.checkpoints.checkpoint import Checkpoint, open_folder
from workers.errors import BadInputError
from workers.storage import open_store
from workers.storage.locations import find_location


def open_checkpoint(location: str) -> Checkpoint:
    """Open the Hugging Face checkpoint at `location` (plain path, `file://`, `s3://`, `shipped:`, a model
    of the hub), or the base with the adapter of `BASE+ADAPTER`, each side such a location.

    Reads headers, index and configuration, no tensor. Raises `BadInputError` naming the file, and the
    tensor where there is one, for anything that is missing, damaged or contradictory.
    """
    sides = split_adapter(location)
    if sides is None:
        return open_folder(location)
    base, adapter = sides[0], open_adapter(sides[1])
    opened = open_checkpoint(base)
    if opened.adapter is not None:
        raise BadInputError(
            f"{location}: two adapters; only one is applied: write the base with the first one "
            "(a recipe of one `passthrough` rule), and adapt that"
        )
    return replace(opened, adapter=adapter)


def absolute_checkpoint_location(location: str) -> str:
    """The same checkpoint, independent of the current folder."""
    sides = split_adapter(location)
    if sides is None:
        return find_location(location)
    return f"{absolute_checkpoint_location(sides[0])}+{find_location(sides[1])}"


def split_adapter(location: str) -> tuple[str, str] | None:
    """(base, adapter) of `BASE+ADAPTER`; None if it is one place, also one with a plus in its name.

    Of several pluses that one counts behind which an adapter lies.
    """
    if "+" not in location or _is_there(location):
        return None
    sides = [
        (location[:position], location[position + 1 :])
        for position, letter in enumerate(location)
        if letter == "+" and 0 < position < len(location) - 1
    ]
    if len(sides) < 2:
        return sides[0] if sides else None
    adapted = [(base, adapter) for base, adapter in sides if _is_there(adapter, CONFIG_FILE)]
    return next((pair for pair in adapted if _is_there(pair[0])), (adapted or sides)[-1])


def _is_there(location: str, prefix: str = "") -> bool:
    try:
        return next(open_store(location).list_objects(prefix), None) is not None
    except BadInputError:
        return False  # it is no location at all, such as s3://bucket/base+s3://bucket/adapter


def check_same(opened: Mapping[str, Checkpoint], fingerprints: Mapping[str, str]) -> None:
    """Raise `BadInputError` if a checkpoint, opened on this machine, is another one than the driver's."""
    for name, fingerprint in fingerprints.items():
        if opened[name].fingerprint != fingerprint:
            raise BadInputError(
                f"{opened[name].location}: is another checkpoint on this worker's machine than where the "
                "campaign was started"
            )
