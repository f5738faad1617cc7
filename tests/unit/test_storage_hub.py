"""Models of the hub as parents: pinned to a commit, downloaded once, errors that say what to do.

Each opening runs in a process of its own, because huggingface_hub reads its environment once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_files import write_checkpoint
from tests.hub_server import HubServer
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.storage.locations import absolute_location, find_location

OPEN = """
import json, sys
from workers.errors import BadInputError
from workers.storage import StorageError
from workers.checkpoints import absolute_checkpoint_location, open_checkpoint
try:
    places = [absolute_checkpoint_location(place) for place in sys.argv[1:]]
    opened = [open_checkpoint(place) for place in sys.argv[1:]]
except (BadInputError, StorageError) as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
else:
    print(json.dumps({
        "absolute": places,
        "locations": [c.location for c in opened],
        "fingerprints": [c.fingerprint for c in opened],
        "folders": [str(c.folder) for c in opened],
    }))
"""


class Hub:
    """A server with one model, `org/name`, and a cache of one's own."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.model = write_checkpoint(
            folder / "model",
            {"a": torch.arange(5000, dtype=torch.float32)},
            {"b": torch.arange(7, dtype=torch.bfloat16)},
            files={"tokenizer.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"},
        )
        for extra in ("pytorch_model.bin", "code.py", "consolidated.safetensors"):
            (self.model / extra).write_bytes(b"not needed")
        (self.model / "original").mkdir()
        (self.model / "original" / "params.json").write_text("{}")
        self.commit = server.publish("org/name", self.model)
        self.here = folder / "here"
        self.here.mkdir()

    def open(self, *places: str, **environment: str) -> Any:
        found = subprocess.run(
            [sys.executable, "-c", OPEN, *places],
            env={name: value for name, value in os.environ.items() if not name.startswith("HF_")}
            | {
                "HF_ENDPOINT": self.server.endpoint,
                "HF_HOME": str(self.folder / "cache"),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            }
            | environment,
            cwd=self.here,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with HubServer() as server:
        yield Hub(server, tmp_path)


@pytest.mark.parametrize("place", ["hf://org/name", "org/name", "org/name@main", "hf://org/name/"])
def test_a_model_of_the_hub_is_a_checkpoint_at_one_commit(hub: Hub, place: str) -> None:
    found = hub.open(place)
    pinned = f"hf://org/name@{hub.commit}"
    assert found["absolute"] == found["locations"] == [pinned]
    needed = {
        "config.json", "tokenizer.json", "README.md", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    (folder,) = map(Path, found["folders"])
    assert {path.name for path in folder.iterdir()} == needed
    for name in needed:
        assert (folder / name).read_bytes() == (hub.model / name).read_bytes()
    assert len(hub.server.asked("GET /api/models/org/name/revision/main")) == 1


def test_what_is_pinned_is_downloaded_once_and_needs_no_network(hub: Hub) -> None:
    first = hub.open("org/name")
    before = list(hub.server.requests)
    assert len([r for r in before if r.startswith("GET /org/name/resolve/")]) == 6
    pinned = first["locations"][0]
    assert hub.open(pinned, HF_HUB_OFFLINE="1") == first
    assert hub.server.requests == before
    assert hub.open(pinned) == first
    assert not [r for r in hub.server.requests[len(before) :] if r.startswith("GET /org/name/")]


def test_a_revision_stays_what_it_was(hub: Hub) -> None:
    (hub.model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 9}')
    new = hub.server.publish("org/name", hub.model)
    hub.server.branches["org/name", "v1"] = hub.commit
    found = hub.open("org/name", "org/name@v1", f"hf://org/name@{hub.commit}")
    assert found["locations"] == [
        f"hf://org/name@{commit}" for commit in (new, hub.commit, hub.commit)
    ]
    assert found["fingerprints"][0] != found["fingerprints"][1] == found["fingerprints"][2]


def test_a_download_that_is_cut_goes_on(hub: Hub) -> None:
    large = "model-00001-of-00002.safetensors"
    hub.server.cut_once[large] = 3000
    found = hub.open("org/name")
    assert Path(found["folders"][0], large).read_bytes() == (hub.model / large).read_bytes()
    assert len(hub.server.asked(f"GET /org/name/resolve/{hub.commit}/{large}")) == 2


def test_an_adapter_and_its_base_may_lie_on_the_hub(hub: Hub) -> None:
    """The places are told apart; that this is no adapter is found in its files."""
    hub.server.publish("org/adapter", hub.model)
    found = hub.open("org/name+org/adapter")
    assert found["error"] == "BadInputError"
    assert "adapter_config.json" in found["message"]
    assert "hf://org/adapter@" in found["message"]


# -- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("org/nothing", "hf://org/nothing@main: the hub has no model org/nothing"),
        ("org/name@v9", "hf://org/name@v9: org/name has no revision 'v9'"),
        (f"hf://org/name@{'0' * 40}", "has no revision"),
        ("hf://org/name/folder", "is no model of the hub"),
        ("hf://", "is no model of the hub"),
        ("hf://org/-name--x..", "no model"),
    ],
)
def test_what_is_not_on_the_hub_is_said(hub: Hub, place: str, message: str) -> None:
    found = hub.open(place)
    assert found["error"] == "BadInputError"
    assert message in found["message"]


def test_a_gated_model_needs_a_token(hub: Hub) -> None:
    hub.server.gated.add("org/name")
    found = hub.open("org/name")
    assert found["error"] == "BadInputError"
    assert "is gated" in found["message"] and "HF_TOKEN" in found["message"]


@pytest.mark.parametrize("place", ["org/name", f"hf://org/name@{'1' * 40}"])
def test_offline_is_said(hub: Hub, place: str) -> None:
    found = hub.open(place, HF_HUB_OFFLINE="1")
    assert found["error"] == "BadInputError"
    assert "HF_HUB_OFFLINE is set" in found["message"]
    assert hub.server.requests == []


def test_a_hub_out_of_reach_is_no_fault_of_the_users(hub: Hub) -> None:
    found = hub.open("org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert found["error"] == "StorageError"
    assert "hf://org/name@main" in found["message"]


# -- what is a path --------------------------------------------------------------------------


def test_a_folder_of_the_name_comes_first(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_checkpoint(hub.here / "org" / "name", {"c": torch.zeros(1)})
    found = hub.open("org/name")
    assert found["locations"] == [str(hub.here / "org" / "name")]
    # Nor is a name in a folder that is here ever the hub's.
    assert str(hub.here / "org" / "other") in hub.open("org/other")["message"]
    assert hub.server.requests == []


def test_a_target_is_never_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_location("org/name") == str(tmp_path / "org" / "name")
    for path in ("a/b/c", "./org/name", "../org", "name", "org/name/", "~/x", "org/na me"):
        assert find_location(path) == absolute_location(path)
    with pytest.raises(BadInputError, match="nowhere"):
        open_checkpoint("nowhere")
