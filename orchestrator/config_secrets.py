"""A campaign's configuration is recorded in its store and shown in its report: no secret may be in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.secrecy import is_secret_name, secret_in

_ADVICE = (
    "a configuration is recorded and shown; leave it in the environment of the processes that need it, or in "
    "their credentials files"
)


def check_no_secrets(data: Any, refuse: Callable[[str, str], None], key: str = "") -> None:
    """Call `refuse(key, problem)` for a text that holds a secret, and for one whose key says that it is one.

    `data` is plain: `engine.vllm` may hold anything.
    """
    if isinstance(data, dict):
        for name, value in data.items():
            own = f"{key}.{name}" if key else str(name)
            if key and isinstance(value, str) and value and is_secret_name(str(name)):
                refuse(own, f"has the name of a secret: {_ADVICE}")
            check_no_secrets(value, refuse, own)
    elif isinstance(data, list):
        for number, value in enumerate(data):
            check_no_secrets(value, refuse, f"{key}.{number}")
    elif isinstance(data, str) and (found := secret_in(data)):
        refuse(key, f"holds {found}: {_ADVICE}")
