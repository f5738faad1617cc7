"""What a scan says to whom would search an expert space."""

import pytest

from orchestrator.mri.expert_advice import expert_advice, expert_advice_notes
from tests.expert_scans import scan_of


def test_experts_that_differ_are_advised_and_what_is_dead_everywhere_is_not() -> None:
    merits = {"a": {0: [[1.0, 0.0, 0.0, 1.0]]}, "b": {0: [[1.0, 0.5, 0.0, 3.0]]}}
    found = expert_advice(scan_of(merits))
    assert found is not None
    assert (found["experts"], found["is_telling"]) == (3, True)
    assert found["shares"] == {"b": pytest.approx((0.5 + 1.0 + 0.75) / 3)}
    (line,) = expert_advice_notes(found)
    assert (
        line
        == "for an expert space: advises shares for 3 experts that spread by 0.204124; on the mean b 0.75"
    )


def test_even_merits_tell_nothing() -> None:
    (line,) = expert_advice_notes(expert_advice(scan_of({p: {0: [[1.0, 1.0]]} for p in "ab"})))
    assert "shares for 2 experts that spread by 0, less than 0.01: it tells nothing" in line


def test_one_parent_or_a_dense_model_has_no_line() -> None:
    assert expert_advice(scan_of({"a": {0: [[1.0, 1.0]]}})) is None
    assert expert_advice(scan_of({p: {0: [[1.0]]} for p in "ab"}) | {"probe": {}}) is None
    assert expert_advice_notes(None) == []


def test_other_numbers_of_experts_are_told() -> None:
    found = expert_advice(scan_of({"a": {0: [[1.0] * 4]}, "b": {0: [[1.0] * 3]}}))
    assert found is not None
    (line,) = expert_advice_notes(found)
    assert line.startswith("advises no shares for experts: layer 0 has 4 experts in a, but 3 in b")
