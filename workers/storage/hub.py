"""Models of the Hugging Face hub, as folders of its local cache at one commit.

`hf://org/name[@revision]`: a branch, tag or commit, else `main`. A revision is resolved once per process to
the commit that it stands for, and only that is passed on (`hf://org/name@COMMIT`), so that every worker,
and whoever repeats the merge, gets the same files. They lie in the cache of `huggingface_hub` (`HF_HOME`),
which also brings the endpoint, the token and the resumed downloads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from workers.errors import BadInputError
from workers.storage.folder import FolderStore
from workers.storage.store import StorageError

HUB_SCHEME = "hf://"

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")
"""What a checkpoint or an adapter consists of; and the model card, for its licence."""

NOT_NEEDED = ("*/*", "consolidated*.safetensors")
"""Folders, and the second copy of the weights that some models bring in another layout."""

_ID = r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*"
_LOCATION = re.compile(rf"(?P<id>{_ID})(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(text: str) -> bool:
    """Whether it has the form `org/name` or `org/name@revision`."""
    match = _LOCATION.fullmatch(text)
    return match is not None and "/" in match["id"]


def pinned_location(location: str) -> str:
    """`hf://org/name@COMMIT` for what `location` stands for now.

    Raises `BadInputError` if there is no such model, or it may not be read.
    """
    model, revision = _parts(location)
    return f"{HUB_SCHEME}{model}@{_resolve(model, revision)}"


def pinned_parts(location: str) -> tuple[str, str] | None:
    """Model and commit of a pinned location; None for a place elsewhere."""
    return _parts(location) if location.startswith(HUB_SCHEME) else None


def open_hub(location: str) -> FolderStore:
    """The files at a pinned location, downloaded if they are not in the cache yet, with a progress bar."""
    from huggingface_hub import snapshot_download

    model, commit = _parts(location)
    with _explained(model, commit):
        folder = snapshot_download(
            model, revision=commit, allow_patterns=list(FILES), ignore_patterns=list(NOT_NEEDED)
        )
    return FolderStore(folder, location)


def _parts(location: str) -> tuple[str, str]:
    """Model and revision."""
    match = _LOCATION.fullmatch(location.removeprefix(HUB_SCHEME).removesuffix("/"))
    if match is None:
        raise BadInputError(
            f"location {location!r} is no model of the hub: write hf://org/name or "
            "hf://org/name@revision"
        )
    return match["id"], match["revision"] or "main"


@lru_cache
def _resolve(model: str, revision: str) -> str:
    """The commit of a revision: the hub is asked once, so that one process sees one state of it."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with _explained(model, revision):
        commit = HfApi().model_info(model, revision=revision).sha
    assert commit is not None, "the hub answered without a commit"
    return commit


@contextmanager
def _explained(model: str, revision: str) -> Iterator[None]:
    """Errors of huggingface_hub as ours: the user's as `BadInputError`, the hub's as `StorageError`."""
    from huggingface_hub import errors

    where = f"{HUB_SCHEME}{model}@{revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise BadInputError(
            f"{where}: is gated: accept its terms on the hub, and set HF_TOKEN (or `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInputError(f"{where}: {model} has no revision {revision!r}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise BadInputError(
            f"{where}: the hub has no model {model}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise BadInputError(
            f"{where}: cannot be resolved, as HF_HUB_OFFLINE is set: unset it, or name a commit that "
            f"is in the cache: hf://{model}@COMMIT"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _not_in_cache(where, error) from error
    except Exception as error:
        raise StorageError(f"{where}: could not be fetched from the hub ({error})") from error


def _not_in_cache(where: str, error: BaseException) -> Exception:
    """Why there is nothing to fall back on: offline on purpose, or the hub out of reach."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return BadInputError(
            f"{where}: is not in the cache, and HF_HUB_OFFLINE is set: unset it for the download"
        )
    return StorageError(f"{where}: could not be fetched from the hub ({error})")
