"""The prescription for experts: merit as the signal, against plain numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from orchestrator.mri.expert_prescription import prescribe_experts
from orchestrator.mri.prescription import Prescription
from tests.expert_scans import random_merits, scan_of
from workers.errors import BadInputError


@pytest.mark.parametrize("parents", [("a", "b"), ("a", "b", "c")])
def test_a_donors_share_is_its_merit_over_that_of_all(parents: tuple[str, ...]) -> None:
    merits = random_merits(parents, (0, 1, 3), 8, seed=4)
    found = prescribe_experts(scan_of(merits))
    assert list(found.experts) == [0, 1, 3]
    known: dict[str, list[float]] = {donor: [] for donor in parents[1:]}
    for layer, of in found.experts.items():
        assert list(of) == list(parents[1:])
        for expert in range(8):
            mean = {p: sum(own[expert] for own in merits[p][layer]) / 2 for p in parents}
            for donor, shares in of.items():
                if not sum(mean.values()):
                    assert shares[expert] is None
                    continue
                wanted = mean[donor] / sum(mean.values())
                assert shares[expert] == pytest.approx(wanted, abs=1e-6)
                known[donor].append(wanted)
    spreads = [
        math.sqrt(sum((x - sum(own) / len(own)) ** 2 for x in own) / len(own))
        for own in known.values()
    ]
    assert found.dispersion == pytest.approx(max(spreads), abs=1e-5)
    assert found.is_telling
    assert found.advised_experts == len(known[parents[1]])
    assert found.shares == {}


def one_layer(**merits: list[float]) -> Any:
    return scan_of({parent: {0: [own]} for parent, own in merits.items()})


def test_what_is_dead_in_the_father_alone_is_advised_and_what_is_dead_everywhere_is_not() -> None:
    found = prescribe_experts(one_layer(a=[1.0, 0.0, 0.0, 1.0], b=[1.0, 0.5, 0.0, 3.0]))
    assert found.experts == {0: {"b": (0.5, 1.0, None, 0.75)}}


def test_an_expert_that_all_choose_hardly_ever_is_dead_whatever_little_it_adds() -> None:
    """Of 2000 choices 250 are due to each of 8 experts; 12 are under 5 % of that."""
    merits = {p: {0: [[1.0] * 7 + [0.001]]} for p in "ab"}
    merits["b"][0][0][7] = 0.005
    few = {p: {0: [[280.0] * 7 + [12.0]]} for p in "ab"}
    assert prescribe_experts(scan_of(merits, few)).experts[0]["b"][7] is None
    few["b"][0][0][7] = 100.0
    assert prescribe_experts(scan_of(merits, few)).experts[0]["b"][7] == pytest.approx(
        5 / 6, abs=1e-6
    )


def test_a_donor_whose_experts_are_matched_is_asked_for_the_one_that_belongs_there() -> None:
    merits = {"a": {0: [[1.0, 2.0, 4.0]]}, "b": {0: [[4.0, 1.0, 0.0]]}}
    found = prescribe_experts(scan_of(merits), {"b": {0: (1, 2, 0)}})
    assert found.experts == {0: {"b": (0.5, 0.0, 0.5)}}
    everywhere = {p: {0: [[1.0, 0.0]]} for p in "ab"}
    everywhere["b"][0][0].reverse()
    assert prescribe_experts(scan_of(everywhere)).experts[0]["b"] == (0.0, 1.0)
    matched = prescribe_experts(scan_of(everywhere), {"b": {0: (1, 0)}})
    assert matched.experts[0]["b"] == (0.5, None)


def test_experts_that_are_the_same_in_all_parents_have_no_advice() -> None:
    scan = one_layer(a=[1.0, 2.0], b=[3.0, 2.0])
    scan["static"] = [
        {"tensor": f"e{e}.{n}", "component": "expert", "layer": 0, "expert": e, "of": {},
         "between": {"a|b": {"changed": changed, "distance": 0.0, "cosine": 1.0}}}
        for e, n, changed in ((0, 0, 0.0), (0, 1, 0.0), (1, 0, 0.0), (1, 1, 0.25))
    ]  # fmt: skip
    assert prescribe_experts(scan).experts == {0: {"b": (None, 0.5)}}


def test_merits_that_are_alike_tell_nothing() -> None:
    found = prescribe_experts(one_layer(a=[1.0, 2.0, 3.0], b=[1.01, 2.0, 3.0]))
    assert 0.0 < found.dispersion < 0.01
    assert not found.is_telling


def test_without_merits_there_is_no_advice() -> None:
    scan = one_layer(a=[1.0, 2.0], b=[3.0, 2.0])
    for sets in scan["probe"]["parents"].values():
        for rows in sets.values():
            for row in rows:
                row.get("routing", {}).pop("merit", None)
    for bare in (scan, scan | {"probe": {}}):
        found = prescribe_experts(bare)
        assert (found.experts, found.dispersion, found.is_telling) == ({}, 0.0, False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_merit_that_is_not_finite_is_an_error_that_names_its_place(value: Any) -> None:
    with pytest.raises(BadInputError, match=r"'set0' of b .* expert 1 of layer 0"):
        prescribe_experts(one_layer(a=[1.0, 2.0], b=[3.0, value]))


def test_parents_with_different_numbers_of_experts_are_refused() -> None:
    with pytest.raises(BadInputError, match="2 experts in a, but 3 in b"):
        prescribe_experts(one_layer(a=[1.0, 2.0], b=[3.0, 1.0, 1.0]))


def test_what_is_recorded_is_read_back_the_same() -> None:
    found = prescribe_experts(scan_of(random_merits("abc", (0, 12), 6, seed=9)))
    assert Prescription.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "experts" not in Prescription({}, 0.0, False).to_dict()
