"""What becomes of prompts is described, and workers that treat them otherwise are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from orchestrator.campaign import Campaign
from orchestrator.config import load_config
from orchestrator.engine_description import engine_changes
from orchestrator.errors import EngineMismatchError
from orchestrator.ledger.lease import acquire_lease
from tests.campaigns import write_campaign
from tests.families import write_tokenizer
from tests.unit.test_breeding import Silent
from workers.errors import BadInputError
from workers.evaluation import Chat
from workers.evaluation.engines.fingerprint import describe_prompts
from workers.evaluation.engines.tokenizing import encode_prompts, render

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}"


def make_tokenizer(folder: Path, template: str | None = None) -> Any:
    write_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def test_texts_and_conversations_are_described(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, TEMPLATE)
    found = describe_prompts(tokenizer, "ab")
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ab"]
    assert found["probe_tokens"] == [1, *letters]
    assert found["bos"] and found["put_before"] == [1] and found["put_after"] == []
    assert found["special_tokens"] == "read"
    assert found["chat_template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    # One token of the template's, none of the tokenizer's own; letters that it lacks are <pad>.
    assert found["chat_tokens"][:2] == [1, 0] and found["chat_tokens"].count(1) == 1
    assert describe_prompts(tokenizer, Chat("ab"))["probe_tokens"][:3] == [1, *letters]
    assert set(found) == {
        "probe_tokens", "bos", "put_before", "put_after", "special_tokens", "chat_template", "chat_tokens"
    }  # fmt: skip


def test_without_template_and_with_other_tokens_around(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    found = describe_prompts(tokenizer, "ab")
    assert not found["bos"] and found["put_before"] == [] and found["put_after"] == [2]
    assert found["chat_template"] is None and found["chat_tokens"] is None


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path: Path) -> None:
    """As Llama's does, which asks whether the function is there, in a macro as others do."""
    template = (
        "{% macro day() %}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
        "{% endmacro %}\n  {% if true %}\n{{ day() }}, {% endif %}{{ messages[0].content }}"
    )
    tokenizer = make_tokenizer(tmp_path, template)
    assert render(tokenizer, Chat("ab")) == ("26 Jul 2024, ab", False)
    plain = template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    tokenizer.chat_template = plain.replace("strftime_now", "messages")
    assert render(tokenizer, Chat("ab")) == ("26 Jul 2024, ab", False)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    """As Gemma's refuses a system message."""
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = make_tokenizer(tmp_path, no_system + TEMPLATE)
    assert encode_prompts(tokenizer, [Chat("hello")])
    with pytest.raises(BadInputError, match=r"\(no system\): leave out the task's key system"):
        encode_prompts(tokenizer, [Chat("hello", "Be brief.")])


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    assert encode_prompts(tokenizer, [""]) == [[1]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(BadInputError, match="an empty prompt has no token"):
        encode_prompts(tokenizer, ["ab", ""])


def test_workers_must_treat_prompts_alike(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, TEMPLATE)
    first = describe_prompts(tokenizer, "ab") | {"torch": "2.9"}
    assert engine_changes(first, dict(first)) == []
    tokenizer.chat_template = TEMPLATE + " "
    second = describe_prompts(tokenizer, "ab") | {"torch": "2.9"}
    assert [change.split()[0] for change in engine_changes(first, second)] == [
        "chat_template",
        "chat_tokens",
    ]
    assert engine_changes(first, second | {"torch": "2.8"})[-1] == "torch '2.9' -> '2.8'"
    assert engine_changes(first, {**first, "more": 1}) == ["more None -> 1"]


def test_a_resumed_campaign_keeps_what_it_recorded(tmp_path: Path) -> None:
    campaign = Campaign(load_config(str(write_campaign(tmp_path))), Silent())
    campaign._lease = acquire_lease(campaign.store, print, 0)
    campaign._open_ledger(campaign._read_ledger())
    now = describe_prompts(make_tokenizer(tmp_path / "tokenizer", TEMPLATE), "ab")
    campaign._check_engine(now)
    campaign._check_engine(now)
    assert len([r for r in campaign.ledger.records if r["kind"] == "engine"]) == 1
    other = now | {"chat_template": "0" * 64}
    with pytest.raises(EngineMismatchError, match=r"chat_template '\w{64}' -> '0{64}'\)"):
        campaign._check_engine(other)
