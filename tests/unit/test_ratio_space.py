"""Ratio spaces: genomes of the published kind, and the child that they decode to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.config import SHIPPED, GeneBounds, GenomeConfig
from orchestrator.genomes.build import build_space
from orchestrator.genomes.ratio_space import RatioSpace
from orchestrator.mri.prescription import Prescription
from tests.checkpoint_files import read_tensors
from tests.families import write_model
from workers.checkpoints import ArchitectureMap, open_checkpoint
from workers.errors import BadInputError
from workers.merging import ParentReference
from workers.merging.executor import Merger
from workers.merging.plan import Plan

SKILLS = ("reverse", "sort", "shift")
CHECKPOINTS = {name: open_checkpoint(f"shipped:strings/{name}") for name in (*SKILLS, "base")}
FAMILY = SHIPPED.parent / "workers" / "families" / "strings"
FATHER = ArchitectureMap.of(CHECKPOINTS["reverse"])
NAMES = [tensor.name for tensor in FATHER.tensors]
PUBLISHED = [("darwin16", "opus_e4b"), ("darwin16", "david_e4b"), ("darwin18", "opus_27b")]
DENSITY_REASON = "the method slerp has no densities"


def reference(name: str) -> ParentReference:
    return ParentReference(name, CHECKPOINTS[name].fingerprint)


def make(
    space: str = "darwin14",
    method: str = "linear",
    parents: tuple[str, ...] = ("reverse", "sort"),
    base: str | None = None,
    prescription: Prescription | None = None,
    scans: bool = True,
    father: ArchitectureMap = FATHER,
    **config: Any,
) -> RatioSpace:
    found = build_space(
        GenomeConfig(space=space, method=method, **config),
        father,
        tuple(map(reference, parents)),
        reference(base) if base else None,
        0,
        scans,
        prescription,
    )
    assert isinstance(found, RatioSpace)
    return found


def advise(share: Any = 0.5, is_telling: bool = True, **arguments: Any) -> Prescription:
    """The mother's share of each tensor: one number, or a function of its place."""
    shares = {
        name: {"reverse": 1.0 - r, "sort": r}
        for number, name in enumerate(NAMES)
        for r in [share(number) if callable(share) else share]
    }
    return Prescription(shares, 0.1 if is_telling else 0.0, is_telling, **arguments)


def start_of(space: RatioSpace) -> dict[str, float]:
    return space.point(space.start)


def searched(space: RatioSpace) -> list[str]:
    return [gene.name for gene in space.genes]


def removed(space: RatioSpace) -> dict[str, str]:
    return {gene.gene: gene.reason for gene in space.removed}


def printed(space: str, start: str) -> dict[str, float]:
    """A published genome as its card prints it, from the file."""
    data = yaml.safe_load((SHIPPED / "genome" / f"{space}.yaml").read_text())["starts"][start]
    blocks = data.pop("block_N_ratio")
    return data | {f"block_{n}_ratio": value for n, value in enumerate(blocks)}


# -- the formula -----------------------------------------------------------------------------


def plain_ratio(name: str, genome: dict[str, float], advised: float, blocks: int) -> float:
    """methods.md 1.1 and 1.4, for the four layers of the shipped family, from the tensor's name alone."""
    parts = [(0.2, genome["global_ratio"])]
    if "self_attn" in name and "norm" not in name:
        parts.append((0.4, genome["attn_ratio"]))
    elif "mlp" in name:
        parts.append((0.4, genome["ffn_ratio"]))
    elif "embed" in name:
        parts.append((0.4, genome["embed_ratio"]))
    if name.startswith("layers."):
        count = min(blocks, 4)
        edges = [n * 4 // count for n in range(count + 1)]
        layer = int(name.split(".")[1])
        block = next(n for n in range(count) if edges[n] <= layer < edges[n + 1])
        parts.append((0.4, genome[f"block_{block}_ratio"]))
    own = sum(w * g for w, g in parts) / sum(w for w, _ in parts)
    return genome["mri_trust"] * advised + (1 - genome["mri_trust"]) * own


@pytest.mark.parametrize(("trust", "kinds"), [(0.0, 3), (0.37, 2), (1.0, 3)])
def test_the_child_is_that_of_a_plain_float64_reference(trust: float, kinds: int) -> None:
    """darwin14 on the shipped family: ratio, transplant and blend, tensor by tensor, from bytes to bytes."""
    space = make(prescription=advise(lambda n: (n * 37 % 101) / 100))
    genome = {
        "global_ratio": 0.3, "attn_ratio": 0.0, "ffn_ratio": 1.0, "embed_ratio": 0.62,
        "block_0_ratio": 0.05, "block_1_ratio": 0.4, "block_2_ratio": 0.6, "block_3_ratio": 1.0,
        "mri_trust": trust,
    }  # fmt: skip
    assert set(searched(space)) == set(genome)
    father, mother = (read_tensors(FAMILY / name) for name in ("reverse", "sort"))
    merger = Merger({name: CHECKPOINTS[name] for name in ("reverse", "sort")})
    child = {t.name: torch.empty(t.elements, dtype=torch.bfloat16) for t in FATHER.tensors}
    merger.realize(space.decode(genome), child)
    seen = set()
    for number, tensor in enumerate(FATHER.tensors):
        ratio = plain_ratio(tensor.name, genome, (number * 37 % 101) / 100, blocks=6)
        assert space.ratios(genome)[tensor.name] == pytest.approx((ratio,), abs=1e-6)
        a, b = (of[tensor.stored].double() for of in (father, mother))
        kind = "father" if ratio < 0.15 else "mother" if ratio > 0.85 else "blend"
        expected = {"father": a, "mother": b, "blend": (1 - ratio) * a + ratio * b}[kind]
        got = child[tensor.name].view(tensor.shape)
        if kind == "blend":
            torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(got, expected.bfloat16())
        seen.add(kind)
    assert len(seen) == kinds  # 0.37 of the scan pulls all back from being the mother's


@pytest.mark.parametrize(("name", "start"), PUBLISHED)
def test_published_genomes_are_whole_and_start_a_search(name: str, start: str) -> None:
    genome = printed(name, start)
    assert len(genome) == int(name.removeprefix("darwin"))
    space = make(name, "dare_ties", base="base", start=start)
    found = start_of(space)
    assert {gene: genome[gene] for gene in found} == pytest.approx(found, abs=1e-6)
    assert set(found) | set(removed(space)) == set(genome)
    # Searched: all but what the four layers and the method leave out.
    assert set(removed(space)) == {"merge_method_weight"} | {
        f"block_{n}_ratio" for n in range(4, len(genome) - 8)
    }


def test_the_27b_card_is_a_nearly_even_blend() -> None:
    """With ratios of 0.5 from the scan and a trust of 0.857 its genome moves no tensor by more than 0.07.

    The card's parents have 64 layers, so 10 blocks are 10 blocks; methods.md 7.2.
    """
    genome = printed("darwin18", "opus_27b")
    even = make("darwin18", "slerp", prescription=advise(0.5), blocks=10).ratios(genome)
    own = make("darwin18", "slerp", prescription=advise(0.5)).ratios(genome | {"mri_trust": 0.0})
    for tensor, (ratio,) in even.items():
        assert 0.43 <= ratio <= 0.57
        assert ratio == pytest.approx(0.8571 * 0.5 + 0.1429 * own[tensor][0], abs=1e-6)
    assert max(r for (r,) in own.values()) - min(r for (r,) in own.values()) > 0.2


def test_transplants_begin_beyond_the_thresholds_not_at_them() -> None:
    space = make("mri_only", prescription=advise(lambda n: (0.149999, 0.15, 0.85, 0.850001)[n % 4]))
    assigned = Plan({"reverse": FATHER, "sort": FATHER}, None).assign(space.decode({}))
    for number, name in enumerate(NAMES):
        way = assigned[name]
        if number % 4 in (0, 3):
            source = "reverse" if number % 4 == 0 else "sort"
            assert (way.method.name, way.values["source"], way.copies) == (
                "passthrough",
                source,
                True,
            )
        else:
            assert way.method.name == "linear"


def test_weights_t_and_densities_follow_the_ratio() -> None:
    genome = {"density_a": 0.7, "density_b": 0.6}
    blend = advise(0.3)
    for method, expected in (
        ("slerp", {"t": 0.3}),
        ("linear", {"weight": {"reverse": 0.7, "sort": 0.3}, "normalize": 1.0}),
        ("task_arithmetic", {"weight": {"reverse": 0.7, "sort": 0.3}}),
        ("dare_ties", {"weight": {"reverse": 0.7, "sort": 0.3},
                       "density": {"reverse": 0.7, "sort": 0.6}}),
        ("ties", {"density": {"reverse": 0.7, "sort": 0.6}}),
    ):  # fmt: skip
        base = "base" if method in ("task_arithmetic", "dare_ties", "ties") else None
        space = make("darwin14", method, base=base, prescription=blend)
        recipe = space.decode(start_of(space) | genome | {"mri_trust": 1.0})
        maps = {"reverse": FATHER, "sort": FATHER}
        way = Plan(maps, FATHER if base else None).assign(recipe)["layers.0.mlp.up_proj.weight"]
        assert {key: way.values[key] for key in expected} == expected


def test_norms_keep_all_their_changes() -> None:
    space = make("darwin14", "dare_ties", base="base", prescription=advise(0.3))
    recipe = space.decode(start_of(space) | {"density_a": 0.5})
    way = Plan({"reverse": FATHER, "sort": FATHER}, FATHER).assign(recipe)
    assert way["norm.weight"].values["density"] == {"reverse": 1.0, "sort": 1.0}
    assert way["layers.0.mlp.up_proj.weight"].values["density"]["reverse"] == 0.5


def test_tensors_that_are_treated_alike_share_a_rule() -> None:
    space = make(scans=False)
    recipe = space.decode(start_of(space))
    assert len(recipe.rules) == 1  # all ratios are a half
    one = space.decode(start_of(space) | {"ffn_ratio": 0.6})
    assert len(one.rules) == 2
    assert sorted(name for rule in one.rules for name in rule.where.names) == sorted(NAMES)


# -- what is not searched ------------------------------------------------------------------------


def test_slerp_has_no_density_genes() -> None:
    """Trap 4: a card printed slerp and the densities of DARE."""
    space = make("darwin16", "slerp")
    assert not {"density_a", "density_b"} & set(searched(space))
    assert removed(space)["density_a"] == removed(space)["density_b"] == DENSITY_REASON
    assert {"density_a", "density_b"} <= set(searched(make("darwin16", "dare_ties", base="base")))


def test_the_density_of_a_father_that_is_the_base_is_not_searched() -> None:
    space = make(method="dare_linear", parents=("reverse", "sort"), base="reverse")
    assert "density_b" in searched(space)
    assert removed(space)["density_a"] == "reverse is the base: it has no changes to drop"
    assert "density_a" in searched(make(method="dare_linear", base="base"))


def test_blocks_beyond_the_layers_and_components_that_the_model_lacks() -> None:
    space = make("darwin18", scans=False)
    assert [name for name in searched(space) if "block" in name] == [
        f"block_{n}_ratio" for n in range(4)
    ]
    assert removed(space)["block_9_ratio"] == "the model has only 4 layers"


def test_a_component_that_the_model_lacks_has_no_gene(tmp_path: Path) -> None:
    data = yaml.safe_load((SHIPPED / "genome" / "darwin14.yaml").read_text())
    gene = {"weight": 0.4, "components": ["router"], "low": 0.0, "high": 1.0, "start": 0.5}
    data["genes"]["router_ratio"] = gene
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(data))
    assert removed(make(str(file)))["router_ratio"] == "the model has no such tensor (router)"
    moe = ArchitectureMap(open_checkpoint(str(write_model(tmp_path / "moe", "qwen3_moe", 0))))
    assert "router_ratio" in searched(make(str(file), father=moe))


def test_a_scan_that_tells_nothing_is_not_trusted() -> None:
    """Trap 2: all ratios of the scan are a half. The genome decides, and the reason is given."""
    space = make(prescription=advise(0.5, is_telling=False))
    assert "mri_trust" not in searched(space)
    assert "does not tell tensors apart" in removed(space)["mri_trust"]
    genome = start_of(space) | {"ffn_ratio": 1.0, "attn_ratio": 0.0}
    assert space.ratios(genome)["layers.0.mlp.up_proj.weight"] == (0.7,)
    assert space.ratios(genome)["layers.0.self_attn.q_proj.weight"] == (0.3,)
    with pytest.raises(BadInputError, match="trusts the scan alone"):
        make("mri_only", prescription=advise(0.5, is_telling=False))


def test_without_a_scan_there_is_no_trust() -> None:
    space = make(scans=False)
    assert removed(space)["mri_trust"] == "the campaign does not scan the parents"
    assert not space.to_prescribe
    with pytest.raises(BadInputError, match="trusts the scan alone"):
        make("mri_only", scans=False)


def test_genes_without_a_rule_are_declared_and_removed() -> None:
    for name, gene in (("darwin14", "lambda"), ("darwin16", "merge_method_weight")):
        assert gene in removed(make(name))
        assert gene not in searched(make(name))


def test_parents_that_are_equal_in_a_component_leave_it_without_a_gene() -> None:
    """A fine-tune often freezes its embedding."""
    space = make(prescription=advise(lambda n: n / 50, equal=frozenset({"embed_tokens.weight"})))
    assert removed(space)["embed_ratio"] == "the parents do not differ where it counts"
    assert all(
        "embed_tokens.weight" not in r.where.names for r in space.decode(start_of(space)).rules
    )


def test_every_searched_gene_matters() -> None:
    """Whatever is left in the search: another value of it gives another recipe."""
    for space in (
        make("darwin14", "dare_ties", base="base", prescription=advise(lambda n: n / 60)),
        make("darwin18", "slerp", prescription=advise(lambda n: n / 60)),
        make("per_layer", "ties", base="base", prescription=advise(lambda n: n / 60)),
        make("darwin16", "linear", parents=SKILLS, scans=False),
    ):
        start = start_of(space)
        for gene in space.genes:
            moved = start | {gene.name: round((gene.start + gene.high) / 2 - 0.02, 6)}
            assert space.decode(moved).id != space.decode(start).id, gene.name


# -- spaces -------------------------------------------------------------------------------------


def test_before_the_scan_a_space_names_what_must_be_prescribed() -> None:
    draft = make()
    assert set(draft.to_prescribe) == set(NAMES)
    assert "mri_trust" in searched(draft)
    assert not make(prescription=advise()).to_prescribe
    assert draft.identity == make(prescription=advise(0.2)).identity
    assert draft.identity != make(method="slerp").identity
    assert draft.identity != make(genes={"attn_ratio": GeneBounds(0.0, 0.5, 0.1)}).identity


def test_per_layer_has_a_gene_for_each_layer_and_component() -> None:
    space = make("per_layer", scans=False)
    assert searched(space) == [
        *(f"attn_{n}_ratio" for n in range(4)), *(f"ffn_{n}_ratio" for n in range(4)),
        "embed_ratio", "norm_ratio",
    ]  # fmt: skip
    genome = start_of(space) | {"ffn_2_ratio": 0.8}
    assert {n for n, r in space.ratios(genome).items() if r == (0.8,)} == {
        f"layers.2.mlp.{part}_proj.weight" for part in ("up", "gate", "down")
    }


def test_mri_only_has_no_genes_and_follows_the_scan() -> None:
    space = make("mri_only", prescription=advise(lambda n: n / 50))
    assert searched(space) == []
    assert space.ratios({}) == {name: (n / 50,) for n, name in enumerate(NAMES)}
    unmeasured = advise(0.5)
    del unmeasured.shares["norm.weight"]
    recipe = make("mri_only", prescription=unmeasured).decode({})
    assert all("norm.weight" not in rule.where.names for rule in recipe.rules)


def test_the_pattern_starts_with_low_attention_and_high_mlp() -> None:
    for name in ("darwin14", "darwin16", "darwin18", "per_layer"):
        space = make(name, start="pattern")
        ratios = space.ratios(start_of(space) | {"mri_trust": 0.0})
        attention, mlp = (
            ratios[f"layers.1.{part}.weight"][0] for part in ("self_attn.q_proj", "mlp.up_proj")
        )
        assert attention < 0.4 < 0.6 < mlp


def test_three_parents_have_shares_that_sum_to_one() -> None:
    space = make(parents=SKILLS, scans=False)
    assert {"attn_ratio.sort", "attn_ratio.shift", "block_3_ratio.sort"} <= set(searched(space))
    at_start = space.decode(start_of(space)).rules[0].parameters["weight"]
    assert at_start == {"reverse": 0.5, "sort": 0.25, "shift": 0.25}
    everything = dict.fromkeys(searched(space), 1.0)
    (rule,) = space.decode(everything).rules
    assert rule.parameters["weight"] == {"reverse": 0.0, "sort": 0.5, "shift": 0.5}
    (rule,) = space.decode(dict.fromkeys(everything, 0.0)).rules
    assert (rule.method, rule.parameters) == ("passthrough", {"source": "reverse"})
    advised = {name: {"reverse": 0.2, "sort": 0.7, "shift": 0.1} for name in NAMES}
    trusting = make(parents=SKILLS, prescription=Prescription(advised, 0.2, is_telling=True))
    ratios = trusting.ratios(start_of(trusting) | {"mri_trust": 0.5})
    assert ratios["norm.weight"] == pytest.approx((0.475, 0.175))


def test_methods_that_take_no_share_are_refused() -> None:
    for method in ("passthrough", "nearswap", "model_stock", "sce", "ram"):
        with pytest.raises(BadInputError, match=rf"method {method} takes no share"):
            make(method=method, base="base")
    with pytest.raises(BadInputError, match="2 parents, not 3"):
        make(method="slerp", parents=SKILLS)


# -- files ----------------------------------------------------------------------------------------


def test_a_start_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(BadInputError, match=r"genome\.start: 'opus'.*opus_27b, pattern"):
        make("darwin18", start="opus")
    with pytest.raises(BadInputError, match=r"genome\.start: the space .* has no named starts"):
        build_space(
            GenomeConfig("components", start="x"), FATHER,
            (reference("reverse"), reference("sort")), reference("base"), 0,
        )  # fmt: skip
    with pytest.raises(BadInputError, match="8 starting values for 6 genes"):
        make("darwin16", start="opus_e4b", blocks=6)


def test_bounds_of_the_campaign_replace_those_of_the_file() -> None:
    space = make(genes={"mri_trust": GeneBounds(0.2, 0.4, 0.3)})
    assert [(g.low, g.high, g.start) for g in space.genes if g.name == "mri_trust"] == [
        (0.2, 0.4, 0.3)
    ]
    with pytest.raises(BadInputError, match=r"genome\.genes: 'trust' is no gene"):
        make(genes={"trust": GeneBounds(0.0, 1.0, 0.5)})
    with pytest.raises(BadInputError, match=r"genome\.genes\.mri_trust: start 2"):
        make(genes={"mri_trust": GeneBounds(0.0, 1.0, 2.0)})


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["gense"], {}, "gense"),
        (["components"], ["attn"], "components: 'attn'"),
        (["blocks"], 0, "blocks: 0"),
        (["transplant"], {"below": 0.1}, "transplant"),
        (["transplant"], {"below": 0.9, "above": 0.1}, "transplant"),
        (["genes", "attn_ratio", "weight"], 0.0, "genes.attn_ratio.weight"),
        (["genes", "attn_ratio", "high"], 1.5, "genes.attn_ratio"),
        (["genes", "attn_ratio", "per"], "block", "genes.attn_ratio: per"),
        (["genes", "block_N_ratio", "per"], "head", "genes.block_N_ratio: per"),
        (["genes", "attn_ratio", "components"], ["vision"], "genes.attn_ratio.components: vision"),
        (["genes", "attn_ratio", "stat"], 1, "'stat'"),
        (["genes", "density_a", "weight"], 1, "genes.density_a"),
        (["genes", "tau"], {"low": 0.0, "high": 1.0, "start": 0.5}, "genes.tau"),
        (["fixed"], {"mri_trust": 0.5}, "fixed.mri_trust"),
        (["fixed"], {"attn_ratio": 0.5}, "fixed.attn_ratio"),
        (["starts"], {"mine": {"tau": 0.5}}, "starts.mine.tau"),
        (["starts"], {"mine": {"attn_ratio": [0.5, 0.5]}}, "attn_ratio: 2 starting values"),
        (["starts"], {"mine": {"lambda": 0.5}}, "starts.mine.lambda"),
    ],
)  # fmt: skip
def test_a_malformed_space_is_refused_with_file_and_key(
    path: list[str], value: Any, named: str, tmp_path: Path
) -> None:
    data = yaml.safe_load((SHIPPED / "genome" / "darwin14.yaml").read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "space.yaml"
    file.write_text(json.dumps(data))
    with pytest.raises(BadInputError) as caught:
        make(str(file), start="mine" if path == ["starts"] else None)
    assert str(caught.value).startswith(f"{file}: ")
    assert named in str(caught.value)


def test_genes_per_density_are_needed_by_methods_that_drop(tmp_path: Path) -> None:
    data = yaml.safe_load((SHIPPED / "genome" / "darwin14.yaml").read_text())
    del data["genes"]["density_b"]
    file = tmp_path / "space.yaml"
    file.write_text(json.dumps(data))
    assert make(str(file), "linear")
    with pytest.raises(BadInputError, match="needs a value of 'density'"):
        make(str(file), "ties", base="base")
