"""What must not leave this machine with a job: whoever may read the cluster's state may read its jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from workers.errors import BadInputError

_CREDENTIAL = re.compile(
    r"secret|password|passwd|credential|apikey|(^|_)(api|auth|token|key|pat|cookie)(_|$)",
    re.IGNORECASE,
)
_LEAST_CHARACTERS = 8
"""A shorter value would be found in words that have nothing to do with it."""

_ON_NODES = (
    "nodes have credentials of their own (an instance's role, a mounted secret, their environment)"
)


def looks_like_credential(name: str) -> bool:
    """Whether a variable or key of this name usually holds a secret."""
    return _CREDENTIAL.search(name) is not None


def chosen_environment(assignments: Iterable[str]) -> dict[str, str]:
    """The variables of `NAME=VALUE`. Raises `BadInputError` for what looks like a credential."""
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise BadInputError(f"--env {name!r} is not NAME=VALUE")
        if looks_like_credential(name):
            raise BadInputError(
                f"--env {name}: looks like a credential, which everybody who may see the cluster's jobs "
                f"could read: {_ON_NODES}"
            )
        check_text(value, f"--env {name}")
        found[name] = value
    return found


def check_text(text: str, where: str) -> None:
    """Raise `BadInputError` if a text holds the value of a secret variable of this process, or a URL's."""
    for name, value in os.environ.items():
        if len(value) >= _LEAST_CHARACTERS and looks_like_credential(name) and value in text:
            raise BadInputError(
                f"{where}: holds the value of the environment variable {name}, which everybody who may "
                f"see the cluster's jobs could read: {_ON_NODES}"
            )
    if re.search(r"://[^/\s@'\"]*:[^/\s@'\"]+@", text):
        raise BadInputError(f"{where}: holds a URL with a password in it: {_ON_NODES}")


def check_options(options: Any, where: str) -> None:
    """Raise `BadInputError` if a key of plain data looks like a credential and has a text as its value."""
    if isinstance(options, dict):
        for key, value in options.items():
            if isinstance(value, str) and value and looks_like_credential(str(key)):
                raise BadInputError(
                    f"{where}.{key}: looks like a credential, which would be written into the job and the "
                    f"ledger: {_ON_NODES}"
                )
            check_options(value, f"{where}.{key}")
    elif isinstance(options, list):
        for number, value in enumerate(options):
            check_options(value, f"{where}.{number}")
