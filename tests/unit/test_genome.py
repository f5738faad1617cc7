"""Genome spaces: which genes there are, what they decode to, and what a space file may not say."""

from __future__ import annotations

import copy
import itertools
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import SHIPPED, GeneBounds, GenomeConfig
from orchestrator.genomes.build import build_space
from orchestrator.genomes.parameter_space import GenomeSpace
from tests.families import write_model
from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor, open_checkpoint
from workers.checkpoints.checkpoint import WeightFile
from workers.checkpoints.safetensors_format import Header, TensorEntry
from workers.errors import BadInputError
from workers.merging import METHODS, ParentReference
from workers.merging.plan import Assignment, Plan
from workers.storage import open_store

KINDS = ["qwen3", "llama", "qwen3_moe", "mixtral", "qwen3_5", "qwen3_5_moe", "qwen3_5_vision"]
BASE = ParentReference("base", "0" * 64)
PARENTS = tuple(ParentReference(name, name * 64) for name in "abc")
SPACES = {
    path.stem: data
    for path in (SHIPPED / "genome").glob("*.yaml")
    if "kind" not in (data := yaml.safe_load(path.read_text()))
}
SPACES_AND_METHODS = [(space, method) for space, data in SPACES.items() for method in data["genes"]]

SMALL_SPACE: dict[str, Any] = {
    "groups": {"attention": ["attention", "linear_attention"], "rest": ["mlp", "norm"]},
    "blocks": {"attention": 2},
    "genes": {
        "linear": {"weight": {"per": ["parent", "group"], "low": -1.0, "high": 1.0, "start": 0.5}},
        "slerp": {"t": {"per": ["group", "block"], "low": 0.0, "high": 1.0, "start": 0.5}},
    },
    "exceptions": [{"names": ["*.norm.*"], "parameters": {"density": 1.0}}],
}


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArchitectureMap]:
    root = tmp_path_factory.mktemp("models")
    return {
        kind: ArchitectureMap(open_checkpoint(str(write_model(root / kind, kind, 0))))
        for kind in KINDS
    }


def make(
    father: ArchitectureMap,
    space: str = "components",
    method: str = "linear",
    parents: int = 2,
    base: ParentReference | None = BASE,
    **config: Any,
) -> GenomeSpace:
    genome = GenomeConfig(space=space, method=method, **config)
    return build_space(genome, father, PARENTS[:parents], base, seed=0)


def write_space(folder: Path, data: Any) -> str:
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(data))
    return str(file)


def names(space: GenomeSpace) -> list[str]:
    return [gene.name for gene in space.genes]


def assign(
    space: GenomeSpace, father: ArchitectureMap, genome: dict[str, float]
) -> dict[str, Assignment]:
    """What the plan makes of a genome's recipe, for parents that all have the father's layout."""
    recipe = space.decode(genome)
    plan = Plan({p.name: father for p in recipe.parents}, father if recipe.base else None)
    return plan.assign(recipe)


def start_genome(space: GenomeSpace) -> dict[str, float]:
    return {gene.name: gene.start for gene in space.genes}


# -- which genes there are -------------------------------------------------------------------


def test_a_gene_per_parent_and_group_and_none_for_groups_that_the_model_lacks(
    maps: dict[str, ArchitectureMap],
) -> None:
    groups = ["embedding", "attention", "mlp", "norm"]
    assert names(make(maps["qwen3"])) == [f"weight.{p}.{g}" for g in groups for p in "ab"]
    assert names(make(maps["qwen3"], parents=3)) == [
        f"weight.{p}.{g}" for g in groups for p in "abc"
    ]
    groups.insert(3, "router")
    assert names(make(maps["qwen3_moe"])) == [f"weight.{p}.{g}" for g in groups for p in "ab"]


def test_each_parameter_has_the_axes_that_its_per_names(maps: dict[str, ArchitectureMap]) -> None:
    groups = ["embedding", "attention", "mlp", "norm"]
    for parents in (2, 3):
        space = make(maps["qwen3"], method="ties", parents=parents)
        letters = "abc"[:parents]
        weights = [f"weight.{p}.{g}" for g in groups for p in letters]
        assert names(space) == weights + [f"density.{p}" for p in letters]
    assert names(make(maps["qwen3"], method="slerp")) == [f"t.{g}" for g in groups]


def test_a_block_of_layers_has_genes_of_its_own(maps: dict[str, ArchitectureMap]) -> None:
    regions = ["attention.0", "attention.1", "mlp.0", "mlp.1", "other"]
    space = make(maps["qwen3"], "blocks", blocks=2)
    assert names(space) == [f"weight.{p}.{r}" for r in regions for p in "ab"]
    # The space's own number is 4, and the model has 4 layers; it cannot be cut into more.
    assert len(make(maps["qwen3"], "blocks").genes) == 2 * (4 + 4 + 1)
    assert names(make(maps["qwen3"], "blocks", blocks=9)) == names(make(maps["qwen3"], "blocks"))
    assert names(make(maps["qwen3"], "blocks", blocks=1)) == [
        f"weight.{p}.{g}" for g in ("attention", "mlp", "other") for p in "ab"
    ]


def test_a_gene_without_axes_is_shared_by_all(
    maps: dict[str, ArchitectureMap], tmp_path: Path
) -> None:
    data = copy.deepcopy(SMALL_SPACE)
    data["genes"]["linear"]["weight"]["per"] = []
    space = make(maps["qwen3"], write_space(tmp_path, data))
    assert names(space) == ["weight"]
    found = assign(space, maps["qwen3"], {"weight": 0.25})
    assert found["layers.0.mlp.up_proj.weight"].values["weight"] == {"a": 0.25, "b": 0.25}


def test_a_parent_that_is_the_base_has_no_genes(maps: dict[str, ArchitectureMap]) -> None:
    """It has no changes to weigh or to drop; without a base every parent's weight counts."""
    father = PARENTS[0]
    for method in ("ties", "dare_linear", "task_arithmetic"):
        space = make(maps["qwen3"], method=method, base=father)
        assert {name.split(".")[1] for name in names(space)} == {"b"}
        assert all("a is the base" in gene.reason for gene in space.removed)
        whole = make(maps["qwen3"], method=method)
        assert space.decode(start_genome(space)).rules == whole.decode(start_genome(whole)).rules
    assert {name.split(".")[1] for name in names(make(maps["qwen3"], base=father))} == {"a", "b"}


# -- blocks partition the layers -------------------------------------------------------------

IN_LAYER = {
    "attention": "self_attn.q_proj.weight",
    "linear_attention": "linear_attn.in_proj.weight",
    "mlp": "mlp.up_proj.weight",
    "norm": "input_layernorm.weight",
}


def made_up_model(folder: Path, layers: list[set[str]]) -> ArchitectureMap:
    """A model of these components per layer, and a final norm outside all layers."""
    stored = [
        f"model.layers.{number}.{IN_LAYER[component]}"
        for number, components in enumerate(layers)
        for component in sorted(components)
    ]
    stored.append("model.norm.weight")
    entries = tuple(TensorEntry(n, "F32", (1,), 4 * i, 4 * i + 4) for i, n in enumerate(stored))
    file = WeightFile("model.safetensors", 4 * len(stored), Header(entries, b""))
    return ArchitectureMap(Checkpoint(open_store(str(folder)), {}, (file,), ()))


def first_region(space: GenomeSpace, tensor: LogicalTensor) -> tuple[str, int | None] | None:
    region = next((r for r in space.regions if r.where.matches(tensor)), None)
    return (region.group, region.block) if region else None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layers=st.lists(
        st.sets(st.sampled_from(sorted(IN_LAYER)), min_size=1), min_size=1, max_size=14
    ),
    blocks=st.integers(1, 16),
)
def test_blocks_cut_the_layers_evenly_and_each_tensor_lies_in_one(
    tmp_path_factory: pytest.TempPathFactory, layers: list[set[str]], blocks: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    data = SMALL_SPACE | {"blocks": {"attention": blocks, "rest": blocks}}
    father = made_up_model(folder, layers)
    space = make(father, write_space(folder, data), "slerp")
    count = min(blocks, len(layers))
    block_of: dict[int, int | None] = {}
    for tensor in father.tensors:
        group = "attention" if "attention" in tensor.component else "rest"
        found = first_region(space, tensor)
        assert found is not None
        assert found[0] == group
        layer = len(layers) - 1 if tensor.layer is None else tensor.layer
        assert block_of.setdefault(layer, found[1]) == found[1], "a layer is in two blocks"
    if count == 1:
        assert set(block_of.values()) == {None}
    else:
        sequence = [block_of[layer] for layer in range(len(layers))]
        sizes = [len(list(same)) for _, same in itertools.groupby(sequence)]
        assert list(dict.fromkeys(sequence)) == list(range(count)), "blocks are runs, in order"
        assert max(sizes) - min(sizes) <= 1
    # A gene for each region that has tensors, and none besides.
    used = {first_region(space, tensor) for tensor in father.tensors}
    assert set(names(space)) == {
        f"t.{group}" if block is None else f"t.{group}.{block}"
        for group, block in filter(None, used)
    }


# -- decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize(("space_name", "method"), SPACES_AND_METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_space_and_method_fits_every_kind_of_model(
    kind: str, space_name: str, method: str, maps: dict[str, ArchitectureMap]
) -> None:
    father = maps[kind]
    searched = {c for group in SPACES[space_name]["groups"].values() for c in group}
    for parents in (2, 3) if METHODS[method].parents[1] is None else (2,):
        space = make(father, space_name, method, parents)
        assert space.point(space.start) == start_genome(space)
        assert space.point([0.0] * len(space.genes)) == {g.name: g.low for g in space.genes}
        assert space.point([1.0] * len(space.genes)) == {g.name: g.high for g in space.genes}
        for corner in (0.0, 0.5, 1.0):
            found = assign(space, father, space.point([corner] * len(space.genes)))
            assert found.keys() == father.by_name.keys()
            for tensor in father.tensors:
                wanted = method if tensor.component in searched else "passthrough"
                assert found[tensor.name].method.name == wanted, tensor.name
    assert (space.decode(start_genome(space)).base is not None) == (
        METHODS[method].uses_base != "never"
    )


def test_each_gene_reaches_its_tensors_and_no_other(maps: dict[str, ArchitectureMap]) -> None:
    father = maps["qwen3_5"]
    space = make(father, "blocks", "ties", blocks=2)
    reached: set[str] = set()
    before = assign(space, father, start_genome(space))
    for gene in space.genes:
        changed = assign(space, father, start_genome(space) | {gene.name: gene.high - 0.01})
        different = {name for name in before if before[name].values != changed[name].values}
        assert different, f"{gene.name} changes nothing"
        parameter, parent, *region = gene.name.split(".")
        for name in different:
            old, new = before[name].values[parameter], changed[name].values[parameter]
            assert {p for p in old if old[p] != new[p]} == {parent}
            if region:
                group, *block = region
                components = SPACES["blocks"]["groups"][group]
                assert father.by_name[name].component in components
                layer = father.by_name[name].layer
                assert not block or layer is None or layer // 2 == int(block[0])
        reached |= different
    searched = {c for group in SPACES["blocks"]["groups"].values() for c in group}
    assert reached == {t.name for t in father.tensors if t.component in searched}


SENSITIVE = ("*norm*", "*.A_log", "*.dt_bias", "*.conv1d.*")


@pytest.mark.parametrize("space_name", SPACES)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_sensitive_tensors_keep_all_their_entries(
    space_name: str, method: str, maps: dict[str, ArchitectureMap]
) -> None:
    father = maps["qwen3_5"]
    space = make(father, space_name, method)
    genome = start_genome(space) | {"density.a": 0.4, "density.b": 0.6}
    found = assign(space, father, genome)
    seen: dict[str, int] = dict.fromkeys(SENSITIVE, 0)
    for name, assignment in found.items():
        matching = [pattern for pattern in SENSITIVE if fnmatchcase(name, pattern)]
        for pattern in matching:
            seen[pattern] += 1
        wanted = {"a": 1.0, "b": 1.0} if matching else {"a": 0.4, "b": 0.6}
        assert assignment.values["density"] == wanted, name
    assert all(seen.values()), seen


def test_an_exception_fixes_only_what_it_names(maps: dict[str, ArchitectureMap]) -> None:
    father = maps["qwen3_5"]
    space = make(father, "blocks", "ties", blocks=2)
    genome = start_genome(space) | {"weight.a.attention.1": 0.9, "weight.b.attention.1": 0.3}
    found = assign(space, father, genome)
    (name,) = [n for n in found if n.endswith("layers.2.linear_attn.A_log")]
    assert found[name].values["weight"] == {"a": 0.9, "b": 0.3}


def test_what_is_in_no_group_stays_the_fathers(maps: dict[str, ArchitectureMap]) -> None:
    father = maps["qwen3_5_vision"]
    space = make(father, "components", "dare_ties")
    found = assign(space, father, start_genome(space))
    vision = [tensor.name for tensor in father.tensors if tensor.component == "vision"]
    assert vision
    for name in vision:
        assert found[name].method.name == "passthrough"
        assert found[name].values == {"source": "a", "scale": 1.0}


# -- numbers ---------------------------------------------------------------------------------


def test_genes_are_rounded_so_that_near_points_are_one_candidate(
    maps: dict[str, ArchitectureMap],
) -> None:
    space = make(maps["qwen3"])
    middle = [0.123456789] * len(space.genes)
    near = [0.123456789 + 1e-9] * len(space.genes)
    far = [0.123456789 + 1e-5] * len(space.genes)
    assert space.point(middle) == {g.name: 0.132222 for g in space.genes}  # 0.01 + 0.99 * 0.123...
    assert space.decode(space.point(near)).id == space.decode(space.point(middle)).id
    assert space.decode(space.point(far)).id != space.decode(space.point(middle)).id


def test_zero_has_no_sign(maps: dict[str, ArchitectureMap], tmp_path: Path) -> None:
    """-0.0 and 0.0 are equal, so they must be one genome with one recipe."""
    space = make(maps["qwen3"], write_space(tmp_path, SMALL_SPACE))
    below, above = ([0.5 + sign * 1e-9] * len(space.genes) for sign in (-1, 1))
    assert space.point(below) == space.point(above)
    assert space.decode(space.point(below)).id == space.decode(space.point(above)).id


def test_a_point_needs_a_coordinate_for_every_gene(maps: dict[str, ArchitectureMap]) -> None:
    space = make(maps["qwen3"])
    with pytest.raises(ValueError, match="argument"):
        space.point(space.start[:-1])


def test_the_seed_and_the_parents_are_part_of_the_recipe(maps: dict[str, ArchitectureMap]) -> None:
    config = GenomeConfig()
    spaces = [
        build_space(GenomeConfig(), maps["qwen3"], PARENTS[:2], BASE, seed=0),
        build_space(config, maps["qwen3"], PARENTS[:2], BASE, seed=1),
        build_space(config, maps["qwen3"], PARENTS[1::-1], BASE, seed=0),
        build_space(config, maps["qwen3"], PARENTS[:2], ParentReference("base", "1" * 64), seed=0),
    ]
    assert len({space.decode(start_genome(space)).id for space in spaces}) == 4


def test_the_campaign_may_set_the_bounds(maps: dict[str, ArchitectureMap]) -> None:
    space = make(maps["qwen3"], genes={"weight": GeneBounds(low=-2.0, high=3.0, start=1.0)})
    assert {(g.low, g.high, g.start) for g in space.genes} == {(-2.0, 3.0, 1.0)}
    assert space.point(space.start) == start_genome(space)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"method": "nope"}, "nope"),
        ({"method": "passthrough"}, "passthrough"),
        ({"space": "nope"}, "nope"),
        ({"genes": {"density": GeneBounds(0.1, 1.0, 0.5)}}, "genome.genes: 'density'"),
        ({"genes": {"weight": GeneBounds(1.0, 0.5, 0.7)}}, "genome.genes.weight"),
        ({"genes": {"weight": GeneBounds(0.5, 0.5, 0.5)}}, "genome.genes.weight"),
        ({"genes": {"weight": GeneBounds(0.5, 1.0, 1.1)}}, "genome.genes.weight"),
        ({"genes": {"weight": GeneBounds(0.5, float("inf"), 1.1)}}, "genome.genes.weight.high"),
        ({"genes": {"weight": GeneBounds(float("nan"), 1.0, 0.5)}}, "genome.genes.weight.low"),
        ({"genes": {"weight": GeneBounds(1e-7, 1.0, 0.5)}}, "genome.genes.weight.low"),
        (
            {"method": "ties", "genes": {"density": GeneBounds(0.1, 1.5, 0.5)}},
            "genome.genes.density",
        ),
        (
            {"method": "ties", "genes": {"density": GeneBounds(-0.1, 1.0, 0.5)}},
            "genome.genes.density",
        ),
        ({"method": "task_arithmetic", "base": None}, "base"),
        ({"method": "slerp", "parents": 3}, "slerp"),
        ({"blocks": 2}, "genome.blocks"),
    ],
)
def test_a_campaign_that_does_not_fit_the_space_is_refused(
    maps: dict[str, ArchitectureMap], config: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadInputError) as caught:
        make(maps["qwen3"], **config)
    assert named in str(caught.value)


def gene(**changes: Any) -> dict[str, Any]:
    bounds = {"per": ["group"], "low": 0.0, "high": 1.0, "start": 0.5} | changes
    return {"genes": {"linear": {"weight": {k: v for k, v in bounds.items() if v is not None}}}}


def exception(names: Any = ("*",), parameters: Any = None) -> dict[str, Any]:
    names = list(names) if isinstance(names, tuple) else names
    return {"exceptions": [{"names": names, "parameters": parameters}]}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"gruops": {}}, "gruops"),
        ({1: 2, "x": 3}, "1"),
        ({"groups": None}, "groups"),
        ({"groups": ["attention"]}, "groups"),
        ({"groups": {}}, "groups"),
        ({"groups": {"a": "attention"}}, "groups.a"),
        ({"groups": {"a": []}}, "groups.a"),
        ({"groups": {"a": ["atention"]}, "blocks": {}}, "groups.a: 'atention'"),
        ({"groups": {"a": [["attention"]]}, "blocks": {}}, "groups.a"),
        ({"groups": {"a": ["attention"], "b": ["attention"]}, "blocks": {}}, "groups.b: attention"),
        ({"groups": {1: ["attention"]}, "blocks": {}}, "groups.1"),
        ({"groups": {"a": ["router"]}, "blocks": {}}, "no group has a tensor"),
        ({"blocks": ["attention"]}, "blocks"),
        ({"blocks": {"atention": 2}}, "blocks.atention"),
        ({"blocks": {"attention": "many"}}, "blocks.attention"),
        ({"blocks": {"attention": 0}}, "blocks.attention"),
        ({"blocks": {"attention": True}}, "blocks.attention"),
        ({"genes": None}, "genes"),
        ({"genes": {"ties": {}}}, "genes has none for the method 'linear'"),
        ({"genes": {"linear": None}}, "genes.linear"),
        ({"genes": {"linear": {}}}, "genes.linear"),
        ({"genes": {"linear": {"weight": 0.5}}}, "genes.linear.weight"),
        (gene(start=None), "genes.linear.weight"),
        (gene(step=0.1), "genes.linear.weight"),
        (gene(per="parent"), "genes.linear.weight: per"),
        (gene(per=["layer"]), "genes.linear.weight: per"),
        (gene(per=[["group"]]), "genes.linear.weight: per"),
        (gene(low="none"), "genes.linear.weight.low"),
        (gene(low=True), "genes.linear.weight.low"),
        (gene(high=float("inf")), "genes.linear.weight.high"),
        (gene(start=float("nan")), "genes.linear.weight.start"),
        (gene(start=0.1234567), "genes.linear.weight.start"),
        (gene(start=2.0), "genes.linear.weight"),
        (gene(low=1.0), "genes.linear.weight"),
        ({"exceptions": "norm"}, "exceptions"),
        ({"exceptions": [{"names": ["*"]}]}, "exceptions"),
        (exception("*norm*", {"density": 1.0}), "exceptions: names"),
        (exception((1,), {"density": 1.0}), "exceptions: names"),
        (exception(parameters=None), "exceptions: parameters"),
        (exception(parameters={"densty": 1.0}), "exceptions: parameters.densty"),
        (exception(parameters={"weight": "all"}), "exceptions: parameters.weight"),
        (exception(parameters={"normalize": 2.0}), "exceptions: parameters.normalize"),
    ],
)
def test_a_malformed_space_is_refused_with_file_and_key(
    maps: dict[str, ArchitectureMap], tmp_path: Path, changes: dict[Any, Any], key: str
) -> None:
    file = write_space(tmp_path, SMALL_SPACE | changes)
    with pytest.raises(BadInputError) as caught:
        make(maps["qwen3"], file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert key in message


@pytest.mark.parametrize(
    ("method", "genes", "problem"),
    [
        ("linear", {"density": [0.0, 1.0]}, "genes.linear.density: the method ignores it"),
        ("linear", {"t": [0.0, 1.0]}, "genes.linear.t: the method ignores it"),
        ("passthrough", {"source": [0.0, 1.0]}, "genes.passthrough.source: the method ignores it"),
        ("ties", {"weight": [0.0, 1.0]}, "genes.ties: the method needs a value of 'density'"),
        ("ties", {"weight": [0.0, 1.0], "density": [0.0, 1.1]}, "genes.ties.density: bounds"),
        ("ties", {"weight": [0.0, 1.0], "density": [-0.1, 1.0]}, "genes.ties.density: bounds"),
    ],
)
def test_genes_must_be_what_the_method_takes(
    maps: dict[str, ArchitectureMap],
    tmp_path: Path,
    method: str,
    genes: dict[str, list[float]],
    problem: str,
) -> None:
    families = {n: {"per": [], "low": b[0], "high": b[1], "start": b[1]} for n, b in genes.items()}
    if method == "linear":
        families |= SMALL_SPACE["genes"]["linear"]
    file = write_space(tmp_path, SMALL_SPACE | {"genes": {method: families}})
    with pytest.raises(BadInputError) as caught:
        make(maps["qwen3"], file, method)
    assert str(caught.value).startswith(f"{file}: {problem}")


def test_a_gene_for_each_parent_of_a_shared_parameter_is_refused(
    maps: dict[str, ArchitectureMap], tmp_path: Path
) -> None:
    data = copy.deepcopy(SMALL_SPACE)
    data["genes"]["slerp"]["t"]["per"] = ["parent"]
    file = write_space(tmp_path, data)
    with pytest.raises(BadInputError, match=r"genes\.slerp\.t: the method takes one value"):
        make(maps["qwen3"], file, "slerp")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"groups: [", b"[]", b"5", b"", b"a: 2024-99-99"]
)
def test_what_is_no_space_is_refused_by_its_file(
    maps: dict[str, ArchitectureMap], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "space.yaml"
    file.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        make(maps["qwen3"], str(file))
    assert str(caught.value).startswith(f"{file}: ")
