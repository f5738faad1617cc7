"""The prescription: the formulas against a plain reference, and what must not pass for a share."""

from __future__ import annotations

import copy
import json
import math
import random
from statistics import median
from typing import Any

import pytest

from orchestrator.mri.prescription import LEAST_DISPERSION, Prescription, prescribe
from workers.errors import BadInputError

COMPONENTS = ("attention", "mlp", "norm", "linear_attention", "expert", "router", "shared_expert")


def row(
    tensor: str, component: str, layer: int | None, elements: int, of: dict[str, dict[str, float]]
) -> dict[str, Any]:
    full = {
        parent: {"entropy": 0.5, "std": 0.1, "rms": 0.1, "abs_max": 1.0, "mean": 0.0,
                 "nan": 0, "inf": 0} | values
        for parent, values in of.items()
    }  # fmt: skip
    names = list(of)
    between = {
        f"{names[0]}|{name}": {"distance": 1.0, "cosine": 0.9, "changed": 0.8} for name in names[1:]
    }
    return {"tensor": tensor, "component": component, "layer": layer, "expert": None,
            "elements": elements, "of": full, "between": between}  # fmt: skip


def scan_of(*rows: dict[str, Any], parents: tuple[str, ...] = ("a", "b"), **probe: Any) -> Any:
    return {
        "format": 1,
        "parents": [{"name": name, "fingerprint": name * 64} for name in parents],
        "base": None,
        "static": list(rows),
        "probe": probe,
    }


def random_scan(parents: tuple[str, ...], seed: int = 1) -> dict[str, Any]:
    """A model of three layers with all components, an embedding, and two sets of probes."""
    chance = random.Random(seed)

    def of() -> dict[str, dict[str, float]]:
        return {
            parent: {"entropy": chance.uniform(0.3, 0.9), "std": chance.uniform(0.01, 0.2),
                     "rms": chance.uniform(0.01, 2.0)}
            for parent in parents
        }  # fmt: skip

    rows = [row("embed", "embedding", None, 700, of())]
    rows += [
        row(f"layers.{layer}.{component}", component, layer, 10 + 50 * layer, of())
        for layer in range(3)
        for component in COMPONENTS
    ]
    probes = {
        parent: {
            name: [
                {"layer": layer, "component": kind, "mean_token": chance.uniform(0, 0.6),
                 "last_token": chance.uniform(0, 0.6)}
                for layer in range(3) for kind in ("attention", "mlp")
            ]
            for name in ("math", "code")
        }
        for parent in parents
    }  # fmt: skip
    return scan_of(*rows, parents=parents, sets={}) | {"probe": {"sets": {}, "parents": probes}}


def reference(scan: dict[str, Any], alpha: float) -> dict[str, dict[str, float]]:
    """methods.md 1.3, tensor by tensor: Static = (H + S + N) / 3, MRI = alpha Static + (1 - alpha) Probe."""
    parents = [parent["name"] for parent in scan["parents"]]
    shares = {}
    for tensor in scan["static"]:
        alike = [r for r in scan["static"] if r["component"] == tensor["component"]]
        mri = {}
        for parent in parents:
            of = tensor["of"][parent]
            s0 = median([r["of"][p]["std"] for r in alike for p in parents])
            rms0 = median([r["of"][p]["rms"] for r in alike for p in parents])
            static = (
                of["entropy"] + of["std"] / (of["std"] + s0) + min(1, of["rms"] / (4 * rms0))
            ) / 3
            kinds = ["attention", "mlp"]
            if "attention" in tensor["component"]:
                kinds = ["attention"]
            elif tensor["component"] in ("mlp", "expert", "shared_expert", "router"):
                kinds = ["mlp"]
            values = [
                place["mean_token"]
                for places in scan["probe"]["parents"][parent].values()
                for place in places
                if place["layer"] == tensor["layer"] and place["component"] in kinds
            ]
            probe = sum(values) / len(values) if values else None
            mri[parent] = static if probe is None else alpha * static + (1 - alpha) * probe
        shares[tensor["tensor"]] = {p: mri[p] / sum(mri.values()) for p in parents}
    return shares


def all_of(scan: dict[str, Any]) -> list[str]:
    return [tensor["tensor"] for tensor in scan["static"]]


@pytest.mark.parametrize("alpha", [0.5, 0.4, 0.0, 1.0])
@pytest.mark.parametrize("parents", [("a", "b"), ("a", "b", "c")])
def test_shares_are_those_of_a_plain_reference(alpha: float, parents: tuple[str, ...]) -> None:
    scan = random_scan(parents)
    found = prescribe(scan, all_of(scan), alpha)
    expected = reference(scan, alpha)
    assert found.shares.keys() == expected.keys()
    for tensor, shares in expected.items():
        assert found.shares[tensor] == pytest.approx(shares, abs=1e-6)
        assert math.isclose(sum(found.shares[tensor].values()), 1.0, abs_tol=3e-6)
    assert found.is_telling


def test_attention_and_mlp_of_a_layer_differ_by_their_probes() -> None:
    """All weights alike, so that only the probe can tell: it is higher in the mother's mlp."""
    parents = ("a", "b")
    scan = scan_of(
        *(row(f"{c}.0", c, 0, 10, {"a": {}, "b": {}}) for c in ("attention", "mlp", "norm"))
    )
    scan["probe"] = {
        "sets": {},
        "parents": {
            parent: {"math": [
                {"layer": 0, "component": "attention", "mean_token": 0.2, "last_token": 9.0},
                {"layer": 0, "component": "mlp", "mean_token": mlp, "last_token": 9.0},
            ]}
            for parent, mlp in zip(parents, (0.2, 0.6), strict=True)
        },
    }  # fmt: skip
    found = prescribe(scan, all_of(scan), 0.0).shares
    assert found["attention.0"]["b"] == 0.5
    assert found["mlp.0"]["b"] == 0.75
    assert found["norm.0"]["b"] == pytest.approx(0.4 / 0.6, abs=1e-6)


def test_without_a_probe_the_static_part_is_all() -> None:
    scan = random_scan(("a", "b"))
    alone = prescribe(scan | {"probe": {}}, all_of(scan), 0.5).shares
    assert alone == prescribe(scan, all_of(scan), 1.0).shares


def test_without_a_static_part_what_no_probe_is_about_has_no_share() -> None:
    scan = random_scan(("a", "b"))
    bare = scan | {"static": [tensor | {"of": {}} for tensor in scan["static"]]}
    found = prescribe(bare, all_of(scan), 0.5).shares
    assert set(all_of(scan)) - found.keys() == {"embed"}
    assert {k: found[k] for k in found} == {
        k: v for k, v in prescribe(scan, all_of(scan), 0.0).shares.items() if k != "embed"
    }


def test_a_scan_whose_ratios_are_all_a_half_tells_nothing() -> None:
    """The published 27B card: every ratio of the MRI is 0.500."""
    rows = [row(f"t{n}", "mlp", n, 100, {"a": {"rms": n + 1.0}, "b": {"rms": n + 1.0}})
            for n in range(8)]  # fmt: skip
    found = prescribe(scan_of(*rows), [r["tensor"] for r in rows], 0.5)
    assert {shares["b"] for shares in found.shares.values()} == {0.5}
    assert found.dispersion == 0.0
    assert not found.is_telling


def test_dispersion_is_the_spread_over_weights_not_over_tensors() -> None:
    """One small tensor that differs says little of a model; the same tensor, large, does."""

    def scan(elements: int) -> Any:
        return scan_of(
            row("t0", "mlp", 0, 10**6, {"a": {"entropy": 0.5}, "b": {"entropy": 0.5}}),
            row("t1", "mlp", 1, elements, {"a": {"entropy": 0.2}, "b": {"entropy": 0.9}}),
        )

    small, large = (prescribe(scan(n), ["t0", "t1"], 0.5) for n in (10, 10**6))
    assert small.shares == large.shares
    spread = large.shares["t1"]["b"] - large.shares["t0"]["b"]
    assert large.dispersion == pytest.approx(spread / 2, abs=1e-6)
    assert small.dispersion == pytest.approx(spread * math.sqrt(1e-5), abs=1e-5)
    assert large.is_telling
    assert not small.is_telling
    assert small.dispersion < LEAST_DISPERSION <= large.dispersion


@pytest.mark.parametrize(
    "values",
    [
        {"nan": 3},
        {"inf": 1},
        {"nan": 10, "entropy": None, "std": None, "rms": None},
        {"std": 0.0},
    ],
)
def test_what_is_not_finite_or_is_constant_is_an_error_that_names_tensor_and_parent(
    values: dict[str, Any],
) -> None:
    scan = scan_of(
        row("good", "mlp", 0, 10, {"a": {}, "b": {}}),
        row("bad", "mlp", 1, 10, {"a": {}, "b": values}),
    )
    with pytest.raises(BadInputError, match=r"'bad'.* b\b"):
        prescribe(scan, ["good", "bad"], 0.5)
    assert prescribe(scan, ["good"], 0.5).shares.keys() == {
        "good"
    }  # what nobody blends is no matter


def test_an_mri_of_zero_in_all_parents_is_an_error() -> None:
    scan = scan_of(row("dead", "mlp", 0, 10, {"a": {}, "b": {}}))
    places = [{"layer": 0, "component": "mlp", "mean_token": 0.0, "last_token": 0.0}]
    scan["probe"] = {"sets": {}, "parents": {"a": {"math": places}, "b": {"math": places}}}
    with pytest.raises(BadInputError, match="'dead'"):
        prescribe(scan, ["dead"], 0.0)


def test_a_probe_that_is_not_finite_is_an_error() -> None:
    scan = random_scan(("a", "b"))
    scan["probe"]["parents"]["b"]["code"][3]["mean_token"] = float("nan")
    with pytest.raises(BadInputError, match="'code' of b"):
        prescribe(scan, all_of(scan), 0.5)


def test_tensors_without_a_distribution_have_no_share() -> None:
    """A single number, what the mother lacks, and what is constant and the same everywhere: norms never
    trained."""
    constant = row("ones", "norm", 0, 64, {"a": {"std": 0.0}, "b": {"std": 0.0}})
    constant["between"]["a|b"]["changed"] = 0.0
    lacking = row("fathers", "norm", 0, 64, {"a": {}, "b": {}})
    del lacking["of"]["b"]
    scan = scan_of(
        constant,
        lacking,
        row("scalar", "norm", 0, 1, {"a": {"std": 0.0}, "b": {"std": 0.0}}),
        row("other", "norm", 0, 64, {"a": {}, "b": {"rms": 0.3}}),
    )
    found = prescribe(scan, ["ones", "scalar", "other", "fathers"], 0.5)
    assert found.shares.keys() == {"other"}
    assert found.equal == {"ones"}


def test_what_is_recorded_is_read_back_the_same() -> None:
    scan = random_scan(("a", "b", "c"))
    found = prescribe(scan, all_of(scan), 0.5)
    assert Prescription.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert prescribe(copy.deepcopy(scan), all_of(scan), 0.5) == found
