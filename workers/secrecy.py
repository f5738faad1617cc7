"""What must not be written down: passwords, keys and tokens, wherever a text may have them from."""

from __future__ import annotations

import os
import re

HIDDEN = "[hidden]"
LEAST_CHARACTERS = 8
"""A shorter value would be found in words that have nothing to do with it."""

_SECRET_NAME = re.compile(
    r"(token|secret|password|passwd|passphrase|credentials?|cookie|(^|[_-])(pat|auth)|key|key_id)$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")
"""User and password before a host. A revision, as in hf://org/name@main, comes after a slash."""
_SIGNED = re.compile(r"(?<=X-Amz-)(Signature|Credential|Security-Token)=[^&\s'\"]+", re.IGNORECASE)
_KNOWN_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}"
)
"""Tokens of the Hugging Face hub, keys of OpenAI and of AWS, tokens of GitHub."""


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option of this name usually holds a secret."""
    return _SECRET_NAME.search(name) is not None


def secret_in(text: str) -> str | None:
    """What secret a text holds, in words that do not tell it; None if none is seen."""
    for name, value in _secrets():
        if value in text:
            return f"the value of the environment variable {name}"
    if _IN_URL.search(text):
        return "a URL with a user or a password in it"
    if _SIGNED.search(text):
        return "a signed URL"
    return "what looks like a key or a token" if _KNOWN_FORMS.search(text) else None


def hide(text: str) -> str:
    """The text with `[hidden]` in the place of every secret that is seen in it."""
    for _, value in _secrets():
        text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(f"{HIDDEN}@", text)
    text = _SIGNED.sub(rf"\1={HIDDEN}", text)
    return _KNOWN_FORMS.sub(HIDDEN, text)


def _secrets() -> list[tuple[str, str]]:
    """Those in this process's environment, the longest first: one may be a part of another."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= LEAST_CHARACTERS and is_secret_name(name)
    ]
    return sorted(found, key=lambda one: -len(one[1]))
