"""Secrets stay where they are: not in a configuration, so in no record and on no page; not in an error."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import load_config
from tests.campaigns import count_records, start_darwin, write_campaign
from tests.scripted_campaign import CandidateFailedError, run_search, scripted
from workers.errors import BadInputError
from workers.secrecy import hide, is_secret_name

VALUES = {
    "HF_TOKEN": "hf_" + secrets.token_hex(17),
    "AWS_ACCESS_KEY_ID": "AKIA" + secrets.token_hex(8).upper(),
    "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
    "OPENAI_API_KEY": "sk-proj-" + secrets.token_hex(20),
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
PASSWORD = secrets.token_hex(12)
URLS = {
    "with a password": f"https://user:{PASSWORD}@models.example.com/a",
    "with a token for a user": f"s3://{PASSWORD}@bucket/prefix",
    "signed": f"https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature={PASSWORD}&X-Amz-Expires=9",
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All secrets; some are in the environment."""
    for name, value in VALUES.items():
        monkeypatch.setenv(name, value)
    return [*VALUES.values(), PASSWORD]


def vllm(**options: Any) -> dict[str, Any]:
    return {"engine": {"kind": "vllm", "vllm": options}}


PLACES: dict[str, dict[str, Any]] = {
    "a token of the hub": vllm(hf_token=VALUES["HF_TOKEN"]),
    "a reference to the environment": vllm(load_format="${oc.env:RAY_AUTH_TOKEN}"),
    "deep inside": vllm(model_loader_extra_config={"s3": [{"Aws_Secret_Access_Key": PASSWORD}]}),
    "inside a longer text": {"store": f"/folder/{VALUES['AWS_SECRET_ACCESS_KEY']}/x"},
    "the store's place": {"store": URLS["with a token for a user"]},
    "a parent's place": {"base": URLS["with a password"]},
    "a signed place": {"base": URLS["signed"]},
    "a key of AWS": {"health": {"text": VALUES["AWS_ACCESS_KEY_ID"]}},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_with_a_secret_is_refused(
    planted: list[str], tmp_path: Path, place: str
) -> None:
    file = write_campaign(tmp_path, **PLACES[place])
    with pytest.raises(
        BadInputError, match=r"(engine\.vllm|store|base|health).*: (holds|has)"
    ) as refused:
        load_config(str(file))
    assert not any(secret in str(refused.value) for secret in planted)


def test_a_configuration_without_secrets_is_taken(planted: list[str], tmp_path: Path) -> None:
    options = {"max_model_len": 64, "tokenizer_mode": "auto", "hf_token": None, "trust": True}
    config = load_config(
        str(write_campaign(tmp_path, base="hf://org/name@main", **vllm(**options)))
    )
    assert config.engine.vllm == options


def test_no_secret_of_an_error_is_recorded(planted: list[str], tmp_path: Path) -> None:
    told = " ".join([*VALUES.values(), *URLS.values(), "was refused by s3://bucket/a"])

    def answers(recipe: Any, item: Any) -> bool:
        if recipe.rules and recipe.id < "8":
            raise CandidateFailedError(told)
        return len(item.prompt) % 2 == 0

    campaign = scripted(tmp_path, answers, search={"optimizer": "random", "evaluations": 8})
    run_search(campaign)
    assert count_records(campaign.store, "failed") > 0
    for info in campaign.store.list_objects():
        content = campaign.store.read(info.key).decode(errors="replace")
        assert not any(secret in content for secret in planted), info.key
    failed = next(campaign.ledger.of_kind("failed"))["error"]
    assert "models.example.com/a" in failed
    assert failed.endswith("was refused by s3://bucket/a")


def test_no_secret_is_printed(planted: list[str]) -> None:
    process = start_darwin("run", "demo", f"store={URLS['with a token for a user']}", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "store" in json.loads(out)["error"]
    assert not any(secret in out + err for secret in planted)


def test_what_is_no_secret_is_left_alone() -> None:
    for name in (
        "TOKENIZERS_PARALLELISM",
        "RAY_AUTH_MODE",
        "HF_TOKEN_PATH",
        "SSH_AUTH_SOCK",
        "PATH",
    ):
        assert not is_secret_name(name)
    for text in (
        "hf://org/name@main: no such file",
        "runs/demo/child-0123456789ab",
        "s3://bucket/prefix@2/x",
        "task-sk-learn",
        "/home/user@example/models",
    ):
        assert hide(text) == text
