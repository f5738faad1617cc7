"""Expert spaces: the decision for each expert against a plain reference, and what always holds."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import SHIPPED, GeneBounds, GenomeConfig
from orchestrator.genomes.build import build_space
from orchestrator.genomes.expert_space import ExpertSpace
from orchestrator.mri.expert_prescription import prescribe_experts
from orchestrator.mri.prescription import Prescription
from tests.checkpoint_files import (
    described,
    open_merger,
    realize,
)
from tests.expert_parents import random_experts, unfused, write_experts
from tests.expert_scans import Merits, mixture, mixture_map, random_merits, scan_of
from workers.checkpoints import ArchitectureMap
from workers.errors import BadInputError
from workers.merging import METHODS, ParentReference, Recipe
from workers.merging.plan import Plan

LAYERS = (1, 2, 4, 5, 6)
FATHER = mixture_map(LAYERS, 6, dense=(0, 3), shared=True)
GENES = {
    "trust": {"low": 0.0, "high": 1.0, "start": 0.5},
    "share": {"low": 0.0, "high": 1.0, "start": 0.5},
    "density_first": {"low": 0.0, "high": 1.0, "start": 0.75},
    "density_last": {"low": 0.0, "high": 1.0, "start": 0.75},
}
PLAIN = {
    "kind": "experts", "bands": 3, "quantiles": 3, "transplant": {"below": 0.15, "above": 0.85},
    "genes": GENES,
}  # fmt: skip


def write_space(folder: Path, **changes: Any) -> str:
    data = PLAIN | changes
    file = folder / "space.yaml"
    file.write_text(
        yaml.safe_dump({key: value for key, value in data.items() if value is not None})
    )
    return str(file)


def make(
    space: str = "experts",
    method: str = "linear",
    parents: str = "ab",
    prescription: Prescription | None = None,
    father: ArchitectureMap = FATHER,
    probes: bool = True,
    base: ParentReference | None = None,
    **config: Any,
) -> ExpertSpace:
    found = build_space(
        GenomeConfig(space=space, method=method, **config),
        father,
        tuple(ParentReference(name, name * 64) for name in parents),
        base,
        7,
        True,
        prescription,
        probes,
    )
    assert isinstance(found, ExpertSpace)
    return found


def any_genome(space: ExpertSpace, seed: int) -> dict[str, float]:
    chance = random.Random(seed)
    return space.point([chance.random() for _ in space.genes])


def treatments(recipe: Recipe, father: ArchitectureMap = FATHER) -> dict[tuple[int, int], Any]:
    """(layer, expert) -> "keep", a donor's name, or the weights of a blend, as the plan assigns them."""
    plan = Plan({parent.name: father for parent in recipe.parents}, father if recipe.base else None)
    found: dict[tuple[int, int], Any] = {}
    for name, way in plan.assign(recipe).items():
        tensor = father.by_name[name]
        if tensor.component != "expert":
            continue
        what = way.values.get("source") or tuple(way.values["weight"].values())
        what = "keep" if what == recipe.father.name else what
        assert tensor.layer is not None and tensor.expert is not None
        assert found.setdefault((tensor.layer, tensor.expert), what) == what, name
    return found


# -- the decision ----------------------------------------------------------------------------


def reference(
    merits: Merits, genome: dict[str, float], bands: int, quantiles: int
) -> dict[tuple[int, int], Any]:
    """docs/campaigns.md, Expert spaces, expert by expert; where dead ones add nothing at all."""
    father, *donors = merits
    layers = sorted(merits[father])
    found: dict[tuple[int, int], Any] = {}
    for place, layer in enumerate(layers):
        experts = range(len(merits[father][layer][0]))
        advised: dict[int, dict[str, float]] = {}
        for e in experts:
            mean = {p: sum(s[e] for s in merits[p][layer]) / len(merits[p][layer]) for p in merits}
            if sum(mean.values()) > 0:
                advised[e] = {d: round(mean[d] / sum(mean.values()), 6) for d in donors}
        depth = place / (len(layers) - 1)
        density = genome["density_first"] * (1 - depth) + genome["density_last"] * depth
        allowed = int(density * len(experts) + 1e-6)
        together = {e: round(sum(of.values()), 6) for e, of in advised.items()}
        leaving = sorted(advised, key=lambda e: (-together[e], e))[:allowed]
        band = next(b for b in range(bands) if place < math.floor((b + 1) * len(layers) / bands))
        for e in experts:
            found[layer, e] = "keep"
            if e not in leaving:
                continue
            share = {}
            for d in donors:
                lower = sum(of[d] < advised[e][d] for of in advised.values())
                own = genome[f"share.{d}.{band}.{math.floor(quantiles * lower / len(advised))}"]
                trust = genome[f"trust.{d}"]
                share[d] = round(trust * advised[e][d] + (1 - trust) * own, 6)
            best = max(share.values())
            if best > 0.85:
                found[layer, e] = next(d for d in donors if share[d] == best)
            elif sum(share.values()) >= 0.15:
                total = max(sum(share.values()), 1.0)
                found[layer, e] = [share[d] / total for d in donors]
    return found


@pytest.mark.parametrize("parents", ["ab", "abc", "abcd"])
@pytest.mark.parametrize("seed", range(4))
def test_each_expert_is_treated_as_a_plain_reference_says(parents: str, seed: int) -> None:
    merits = random_merits(parents, LAYERS, 6, seed)
    space = make(parents=parents, prescription=prescribe_experts(scan_of(merits)))
    genome = any_genome(space, seed) | {f"trust.{parents[1]}": (0.0, 1.0, 0.3, 0.6)[seed]}
    genome |= {
        "density_first": (0.5, 1.0, 0.9, 0.7)[seed],
        "density_last": (1.0, 0.4, 0.8, 0.95)[seed],
    }
    found = treatments(space.decode(genome))
    # Genes of quantiles without an expert are not searched.
    expected = reference(merits, dict.fromkeys(removed(space), 0.0) | genome, 3, 3)
    assert found.keys() == expected.keys()
    for place, wanted in expected.items():
        if isinstance(wanted, str):
            assert found[place] == wanted, place
        else:  # in percents, the father's the rest
            assert found[place][1:] == pytest.approx(wanted, abs=0.0151), place
            assert sum(found[place]) == pytest.approx(1.0, abs=1e-9)
            assert all(round(100 * share, 6).is_integer() for share in found[place])
    kinds = {"blend" if isinstance(what, tuple) else what for what in found.values()}
    assert {"keep", "blend"} <= kinds


def one_layer(father: list[float], donor: list[float]) -> Prescription:
    return prescribe_experts(scan_of({"a": {0: [father]}, "b": {0: [donor]}}))


def test_a_full_trust_transplants_what_is_dead_in_the_father_and_keeps_what_is_dead_everywhere() -> (
    None
):
    found = one_layer([1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.1])
    space = make(prescription=found, father=mixture_map((0,), 4))
    genome = any_genome(space, 0) | {"trust.b": 1.0, "density_first": 1.0}
    decided = treatments(space.decode(genome), mixture_map((0,), 4))
    assert decided == {(0, 0): (0.5, 0.5), (0, 1): "b", (0, 2): "keep", (0, 3): "keep"}


def test_of_two_donors_above_the_threshold_the_larger_has_the_expert() -> None:
    father = mixture_map((0,), 2)
    advice = Prescription({}, 0.1, True, experts={0: {"b": (0.9, 0.5), "c": (0.05, 0.5)}})
    space = make(parents="abc", prescription=advice, father=father)
    genome = any_genome(space, 0) | {"density_first": 1.0, "trust.b": 0.5, "trust.c": 0.0}
    genome |= {f"share.{d}.0.{q}": v for d, v in (("b", 1.0), ("c", 0.96)) for q in range(3)}
    assert treatments(space.decode(genome), father) == {(0, 0): "c", (0, 1): "c"}
    genome |= {f"share.c.0.{q}": 0.94 for q in range(3)}
    assert treatments(space.decode(genome), father) == {(0, 0): "b", (0, 1): "c"}


def test_the_density_is_a_straight_line_over_the_layers_that_have_experts() -> None:
    father = mixture_map((1, 2, 3, 5, 6), 10, dense=(0, 4))
    advice = {
        layer: {"b": tuple(round(0.3 + 0.01 * e, 2) for e in range(10))}
        for layer in (1, 2, 3, 5, 6)
    }
    space = make(prescription=Prescription({}, 0.1, True, experts=advice), father=father)
    genome = dict.fromkeys(any_genome(space, 0), 0.5) | {"density_first": 0.8, "density_last": 0.0}
    found = treatments(space.decode(genome), father)
    for layer, count in ((1, 8), (2, 6), (3, 4), (5, 2), (6, 0)):
        leaving = {e for e in range(10) if found[layer, e] != "keep"}
        assert leaving == set(range(10 - count, 10)), "those that the donor is advised most"


# -- what always holds -----------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> tuple[str, dict[int, int], Merits, int]:
    parents = draw(st.sampled_from(["ab", "abc"]))
    layers = tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=4))))
    experts = draw(st.integers(1, 9))
    merits = random_merits(parents, layers, experts, draw(st.integers(0, 99)), sets=1)
    return parents, dict.fromkeys(layers, experts), merits, draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_expert_has_one_treatment_and_no_more_leave_than_may(case: Any) -> None:
    parents, counts, merits, seed = case
    experts = next(iter(counts.values()))
    father = mixture_map(tuple(counts), experts)
    advice = prescribe_experts(scan_of(merits))
    space = make(parents=parents, prescription=advice, father=father)
    genome = any_genome(space, seed)
    recipe = space.decode(genome)
    assert recipe == space.decode(dict(reversed(genome.items())))
    assert recipe == Recipe.from_dict(json.loads(recipe.canonical_json))
    places = [
        (layer, expert)
        for rule in recipe.rules
        for layer, spans in rule.where.places
        for first, last in spans
        for expert in range(first, last + 1)
    ]
    assert len(set(places)) == len(places)
    found = treatments(recipe, father)
    assert found.keys() == {(layer, e) for layer in counts for e in range(experts)}
    assert set(places) == {place for place, what in found.items() if what != "keep"}
    first, last = (genome.get(f"density_{end}", 1.0) for end in ("first", "last"))
    for number, layer in enumerate(counts):
        depth = number / (len(counts) - 1) if len(counts) > 1 else 0.0
        leaving = [e for e in range(experts) if found[layer, e] != "keep"]
        assert len(leaving) <= (first + (last - first) * depth) * experts + 1e-6
        if advice.is_telling:
            assert all(advice.experts[layer]["b"][e] is not None for e in leaving)


@settings(max_examples=30, deadline=None)
@given(
    parents=st.sampled_from(["ab", "abc", "abcd"]),
    bands=st.integers(1, 4),
    quantiles=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_the_number_of_genes_does_not_depend_on_that_of_the_experts(
    parents: str, bands: int, quantiles: int, seed: int, tmp_path_factory: Any
) -> None:
    file = write_space(tmp_path_factory.mktemp("space"), bands=bands, quantiles=quantiles)
    donors = len(parents) - 1
    for experts in (16, 40):
        advice = prescribe_experts(scan_of(random_merits(parents, (0, 1, 2, 3), experts, seed)))
        space = make(
            file, parents=parents, prescription=advice, father=mixture_map((0, 1, 2, 3), experts)
        )
        assert len(space.genes) == donors * (bands * quantiles + 1) + 2


# -- genes that cannot matter ----------------------------------------------------------------


def removed(space: ExpertSpace) -> dict[str, str]:
    return {gene.gene: gene.reason for gene in space.removed}


def searched(space: ExpertSpace) -> set[str]:
    return {gene.name for gene in space.genes}


SILENT = {
    "nobody probes": (False, None, "does not probe the parents"),
    "no merits": (True, Prescription({}, 0.0, False), "no merits of experts"),
    "alike": (
        True,
        Prescription({}, 0.003, False, experts={n: {"b": (0.5,) * 6} for n in LAYERS}),
        "spread by 0.003, less than 0.01",
    ),
}


@pytest.mark.parametrize("why", SILENT)
def test_without_advice_there_is_a_share_for_each_band_and_all_experts_follow_it(why: str) -> None:
    probes, advice, reason = SILENT[why]
    space = make(probes=probes, prescription=advice)
    assert searched(space) == {f"share.b.{band}.0" for band in range(3)}
    reasons = removed(space)
    assert reason in reasons["trust.b"]
    assert "nothing says which experts" in reasons["density_first"]
    assert "no quantiles" in reasons["share.b.1.2"]
    assert space.to_prescribe == ()
    found = treatments(space.decode({"share.b.0.0": 0.1, "share.b.1.0": 0.5, "share.b.2.0": 0.9}))
    for (layer, _), what in found.items():
        assert what == {1: "keep", 2: (0.5, 0.5), 4: (0.5, 0.5), 5: "b", 6: "b"}[layer]
    assert space.bands == [[1, 1], [2, 4], [5, 6]]


def test_a_space_waits_for_a_scan_with_a_probe() -> None:
    space = make()
    assert set(space.to_prescribe) == {t.name for t in FATHER.tensors if t.component == "expert"}
    assert "trust.b" in searched(space)
    assert not [
        gene
        for gene in space.removed
        if "density_a" not in gene.gene and "density_b" not in gene.gene
    ]
    assert treatments(space.decode(space.point(space.start)))


def test_genes_that_the_model_has_no_place_for_are_named(tmp_path: Path) -> None:
    genes = GENES | {
        "shared_expert": {"low": 0.0, "high": 0.25, "start": 0.1},
        "attention": {"low": 0.0, "high": 1.0, "start": 0.1},
    }
    file = write_space(tmp_path, genes=genes)
    father = mixture_map((2,), 2)
    space = make(file, prescription=one_layer([1.0, 3.0], [2.0, 1.0]), father=father)
    reasons = removed(space)
    assert "only one layer" in reasons["density_last"]
    assert "only 1 layers" in reasons["share.b.1.0"]
    assert "no expert is in this quantile" in reasons["share.b.0.2"]
    assert "no such tensor (shared_expert)" in reasons["shared_expert.b"]
    assert "attention.b" in searched(space)


def test_densities_of_the_method_are_genes_where_it_has_them() -> None:
    base = ParentReference("base", "a" * 64)  # the father is the base
    space = make(method="dare_ties", parents="abc", base=base)
    assert {"density_b.b", "density_b.c"} <= searched(space)
    assert removed(space) == {"density_a": "a is the base: it has no changes to drop"}
    recipe = space.decode(space.point(space.start))
    assert recipe.base == base
    assert recipe.rules[0].parameters["density"] == {"a": 1.0, "b": 0.9, "c": 0.9}
    assert "density_a" not in searched(make())


# -- what stands beside the experts ----------------------------------------------------------


def given_to(space: ExpertSpace, genome: dict[str, float]) -> dict[str, tuple[float, ...]]:
    """Component beside the experts that is not the father's -> the weights of its tensors."""
    plan = Plan({parent.name: FATHER for parent in space.parents}, None)
    found: dict[str, tuple[float, ...]] = {}
    for name, way in plan.assign(space.decode(genome)).items():
        component = FATHER.by_name[name].component
        if component == "expert" or way.values.get("source") == "a":
            continue
        assert way.method.name == "linear"
        weights = tuple(way.values["weight"].values())
        assert found.setdefault(component, weights) == weights
    return found


def test_the_rest_is_the_fathers_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    space = make(write_space(tmp_path), parents="abc", probes=False)
    assert given_to(space, any_genome(space, 1)) == {}
    genes = GENES | {
        "shared_expert": {"low": 0.0, "high": 0.25, "start": 0.25},
        "attention": {"low": 0.0, "high": 1.0, "start": 0.4},
    }
    file = write_space(tmp_path, genes=genes, others={"norm": 0.25})
    space = make(file, parents="abc", probes=False)
    (gene,) = [gene for gene in space.genes if gene.name == "shared_expert.b"]
    assert (gene.low, gene.high, gene.start) == (0.0, 0.125, 0.125)
    genome = dict.fromkeys(searched(space), 0.0)
    genome |= {"shared_expert.b": 0.125, "shared_expert.c": 0.1}
    genome |= {"attention.b": 0.9, "attention.c": 0.9}
    assert given_to(space, genome) == {
        "shared_expert": (0.775, 0.125, 0.1),
        "attention": (0.0, 0.5, 0.5),
        "norm": (0.75, 0.125, 0.125),
    }
    genome |= dict.fromkeys(("attention.b", "attention.c"), 0.0)
    assert given_to(space, genome).keys() == {"shared_expert", "norm"}


# -- the child -------------------------------------------------------------------------------


def test_the_childs_experts_are_those_of_a_plain_float64_reference(tmp_path: Path) -> None:
    """A fused father, a mother of single experts: what is copied bit by bit, blends to one rounding."""
    one = random_experts(1, dtype=torch.bfloat16)
    two = random_experts(2, near=one)
    written = {
        "a": write_experts(tmp_path / "a", one),
        "b": write_experts(tmp_path / "b", unfused(two)),
    }
    merger = open_merger(written)
    advice = {n: {"b": (0.05, 0.95, 0.4, None, 0.3, 0.2)} for n in range(2)}
    space = make(father=merger.plan.child, prescription=Prescription({}, 0.1, True, experts=advice))
    genome = any_genome(space, 0) | {"trust.b": 1.0, "density_first": 1.0, "density_last": 0.5}
    child = realize(merger, replace(space.decode(genome), parents=merger.references))
    seen = set()
    for tensor in merger.plan.child.tensors:
        own = slice(tensor.offset, tensor.offset + tensor.elements)
        first, second = (of[tensor.stored].reshape(-1)[own] for of in (one, two))
        got = child[tensor.name].reshape(-1)
        # Of the last layer three may leave, those that are advised most.
        shares = (0.0, 1.0, 0.4, 0.0, 0.3, 0.0 if tensor.layer == 1 else 0.2)
        if tensor.component == "router":
            rows = (values.view(6, -1) for values in (got, first, second))
            pieces = list(zip(shares, *rows, strict=True))
        else:
            pieces = [
                (shares[tensor.expert] if tensor.expert is not None else 0.0, got, first, second)
            ]
        for share, new, father, mother in pieces:
            if share in (0.0, 1.0):
                assert torch.equal(new, mother if share else father), tensor.name
            else:
                expected = (1 - share) * father.double() + share * mother.double()
                torch.testing.assert_close(new.double(), expected, rtol=2**-8, atol=1e-6)
            seen.add(share)
    assert seen == {0.0, 0.2, 0.3, 0.4, 1.0}


@pytest.mark.parametrize("method", ["linear", "slerp", "dare_ties", "task_arithmetic", "della"])
def test_any_method_with_weights_blends_experts(method: str) -> None:
    base = ParentReference("base", "0" * 64) if METHODS[method].uses_base == "always" else None
    space = make(method=method, base=base, probes=False)
    recipe = space.decode(space.point(space.start))
    plan = Plan(dict.fromkeys("ab", FATHER), FATHER if base else None)
    ways = {way.method.name for way in plan.assign(recipe).values()}
    assert ways == {method, "as_experts", "passthrough"}


# -- files -----------------------------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"layers": 3}, "unknown key 'layers'"),
    "bands": ({"bands": 0}, "bands: 0 is not a number from 1 on"),
    "quantiles": ({"quantiles": True}, "quantiles: True"),
    "router": ({"router": "harc"}, "router: 'harc' is none of keep, as_experts"),
    "others": ({"others": {"norm": 0.3}}, "others.norm: 0.3 is more than 0.25"),
    "component": ({"others": {"vision": 0.1}}, "others.vision: others is keep, or shares of"),
    "missing": ({"genes": {k: v for k, v in GENES.items() if k != "share"}}, "genes.share is missing$"),
    "gene": ({"genes": GENES | {"speed": GENES["share"]}}, "genes.speed: it is none of"),
    "bounds": ({"genes": GENES | {"trust": {"low": 0.5, "high": 0.1, "start": 0.2}}}, "genes.trust: start"),
    "much": (
        {"genes": GENES | {"shared_expert": {"low": 0.0, "high": 0.5, "start": 0.1}}},
        "genes.shared_expert: .* between 0 and 0.25",
    ),
    "twice": ({"fixed": {"trust": 0.5}}, "fixed.trust: it is a gene"),
    "fixed": ({"fixed": {"share": 0.5}}, "fixed.share: only"),
    "thresholds": ({"transplant": {"below": 0.9, "above": 0.85}}, "transplant: below"),
    "both": (
        {"genes": GENES | {"shared_expert": {"low": 0.0, "high": 0.2, "start": 0.1}},
         "others": {"shared_expert": 0.1}},
        "others.shared_expert: it is a gene",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_named(case: str, tmp_path: Path) -> None:
    changes, problem = WRONG[case]
    with pytest.raises(BadInputError, match=problem):
        make(write_space(tmp_path, **changes))


def test_a_campaign_may_set_bands_and_bounds_but_no_start(tmp_path: Path) -> None:
    space = make(blocks=2, genes={"share": GeneBounds(0.2, 0.4, 0.3)})
    assert {g.name for g in space.genes if g.name.startswith("share.b.1")} == {
        f"share.b.1.{q}" for q in range(3)
    }
    assert "share.b.2.0" not in searched(space)
    assert {(g.low, g.high) for g in space.genes if g.name.startswith("share")} == {(0.2, 0.4)}
    assert make(blocks=2).identity != make().identity
    with pytest.raises(BadInputError, match="no named starts"):
        make(start="pattern")
    with pytest.raises(BadInputError, match="'weight' is no gene"):
        make(genes={"weight": GeneBounds(0.0, 1.0, 0.5)})


def test_models_and_methods_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dense = ArchitectureMap(described({"model.layers.0.mlp.up_proj.weight": (4, 4)}, {}))
    with pytest.raises(BadInputError, match="has no routed experts"):
        make(father=dense)
    shapes = {"model.layers.0.mlp.experts.down_proj": (2, 4, 4),
              "model.layers.0.mlp.experts.down_proj_bias": (2, 4)}  # fmt: skip
    with pytest.raises(BadInputError, match="down_proj_bias' holds something of all experts"):
        make(father=ArchitectureMap(described(shapes, {})))
    with pytest.raises(BadInputError, match="takes no share"):
        make(method="ram", base=ParentReference("base", "0" * 64))
    with pytest.raises(BadInputError, match="iso_c needs whole matrices"):
        make(method="iso_c", base=ParentReference("base", "0" * 64))
    with pytest.raises(BadInputError, match="2 parents, not 3"):
        make(method="slerp", parents="abc")
    trusting = write_space(
        tmp_path, genes={k: v for k, v in GENES.items() if k != "trust"}, fixed={"trust": 1.0}
    )
    with pytest.raises(
        BadInputError, match="trusts the scan alone, but the campaign does not probe"
    ):
        make(trusting, probes=False)


def test_the_shipped_file_is_the_documented_default() -> None:
    data = yaml.safe_load((SHIPPED / "genome" / "experts.yaml").read_text())
    assert data["router"] == "as_experts"
    assert data["others"] == "keep"
    assert (
        len(make(prescription=prescribe_experts(scan_of(random_merits("ab", LAYERS, 6, 1)))).genes)
        == 12
    )


# -- scale -----------------------------------------------------------------------------------


def test_a_candidate_of_the_397b_layout_is_decoded_and_assigned_in_about_a_second() -> None:
    """60 layers of 512 experts, two donors: 92,160 matrices. Bounds are wide, for a busy machine."""
    father = ArchitectureMap(mixture(range(60), 512))
    assert sum(tensor.component == "expert" for tensor in father.tensors) == 92_160
    chance = random.Random(5)
    advice = {
        layer: {d: tuple(round(chance.uniform(0.05, 0.5), 6) for _ in range(512)) for d in "bc"}
        for layer in range(60)
    }
    space = make(
        parents="abc", prescription=Prescription({}, 0.1, True, experts=advice), father=father
    )
    plan = Plan(dict.fromkeys("abc", father), None)
    plan.assign(space.decode(space.point(space.start)))  # what is made once for all candidates
    began = time.process_time()
    recipe = space.decode(any_genome(space, 1))
    assigned = plan.assign(recipe)
    assert time.process_time() - began < 4.0
    assert len(assigned) == len(father.tensors)
    assert len(recipe.canonical_json) < 500_000
    assert len(recipe.rules) < 2600
