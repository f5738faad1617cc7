"""How much of each parent a report says that a tensor is, for every method there is."""

from __future__ import annotations

import pytest

from orchestrator.descent.shares import parent_shares
from tests.checkpoint_files import example_parameters
from workers.merging import METHODS


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.post])
def test_shares_of_any_method_sum_to_one(name: str) -> None:
    method = METHODS[name]
    parents = list("abc"[: method.parents[1] or 3])
    values = method.resolve(example_parameters(method, parents), tuple(parents), True)
    shares = parent_shares(name, values, parents)
    assert list(shares) == parents
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares.values())


def test_shares_are_what_the_parameters_say() -> None:
    weights = {"weight": {"a": -3.0, "b": 1.0}}
    assert parent_shares("linear", weights, ["a", "b"]) == {"a": 0.75, "b": 0.25}
    assert parent_shares("linear", weights, ["a", "b", "c"])["c"] == 0.0
    assert parent_shares("slerp", {"t": 0.3}, ["a", "b"]) == {"a": 0.7, "b": 0.3}
    assert parent_shares("nearswap", {"t": 3.0}, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert parent_shares("passthrough", {"source": "b", "scale": 1.0}, ["a", "b"]) == {
        "a": 0,
        "b": 1,
    }
    assert parent_shares("linear", {"weight": {"a": 0.0, "b": 0.0}}, ["a", "b"]) == {"a": 0, "b": 0}
