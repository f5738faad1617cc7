"""The table and the map of what became of a child's experts."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from orchestrator.reporting.expert_map import expert_chart, expert_map, expert_rows


def lineage(ways: dict[tuple[int, int], dict[str, Any]], **space: Any) -> dict[str, Any]:
    tensors = [
        {"name": f"layers.{layer}.mlp.experts.{expert}.{part}.weight", "component": "expert",
         "layer": layer, "elements": 4, "method": "passthrough" if "source" in way else "linear",
         "parameters": way}
        for (layer, expert), way in ways.items() for part in ("up_proj", "down_proj")
    ]  # fmt: skip
    tensors.append(
        {"name": "layers.1.mlp.shared_expert.up_proj.weight", "component": "shared_expert",
         "layer": 1, "elements": 4, "method": "passthrough", "parameters": {"source": "two"}}
    )  # fmt: skip
    parents = [{"name": name} for name in ("father", "one", "two")]
    return {"parents": parents, "tensors": tensors, "search": {"space": space}}


def of(source: str) -> dict[str, Any]:
    return {"source": source, "scale": 1.0}


WAYS = {
    (1, 0): of("father"), (1, 1): of("one"), (1, 2): {"weight": {"father": 0.5, "one": 0.5, "two": 0.0}},
    (3, 0): of("two"), (3, 1): of("two"), (3, 2): {"weight": {"father": 0.0, "one": 0.25, "two": 0.75}},
}  # fmt: skip


def test_experts_are_counted_by_band_and_by_what_became_of_them() -> None:
    found = expert_map(lineage(WAYS, bands=[[1, 1], [3, 3]]))
    assert found is not None
    assert expert_rows(found) == [
        ["layers", "experts", "kept", "blended", "of one", "of two"],
        ["1", "3", "1", "1", "1", "0"],
        ["3", "3", "0", "1", "0", "2"],
    ]
    whole = expert_map(lineage(WAYS))
    assert whole is not None
    assert expert_rows(whole)[1:] == [["1-3", "6", "1", "2", "1", "2"]]


def test_an_expert_whose_matrices_are_of_two_parents_is_a_blend() -> None:
    data = lineage(WAYS)
    data["tensors"][0]["parameters"] = of("two")
    found = expert_map(data)
    assert found is not None
    assert found.shares[1, 0] == {"father": 0.5, "one": 0.0, "two": 0.5}
    assert expert_rows(found)[1:] == [["1-3", "6", "0", "3", "1", "2"]]


def test_a_model_without_experts_has_no_map() -> None:
    assert expert_map(lineage({})) is None


def test_a_cell_has_the_colour_of_its_donors_as_deep_as_their_share() -> None:
    """The picture itself, decoded: layers by experts, the father's own blank."""
    from io import BytesIO

    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from orchestrator.reporting.charts import PARENT_COLOURS

    found = expert_map(lineage(WAYS))
    assert found is not None
    svg = expert_chart(found)
    assert svg == expert_chart(found)
    (encoded,) = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)
    pixels = imread(BytesIO(base64.b64decode(encoded)))
    assert pixels.shape == (2, 3, 4)
    one, two = (to_rgb(colour) for colour in PARENT_COLOURS[1:3])
    wanted = {
        (0, 0): None, (0, 1): (*one, 1.0), (0, 2): (*one, 0.5), (1, 0): (*two, 1.0),
        (1, 2): (*(0.25 * a + 0.75 * b for a, b in zip(one, two, strict=True)), 1.0),
    }  # fmt: skip
    upright = pixels if pixels[0][0][3] == 0.0 else pixels[::-1]  # SVG may be drawn from below
    for (row, column), colour in wanted.items():
        if colour is None:
            assert upright[row][column][3] == 0.0
        else:
            assert tuple(upright[row][column]) == pytest.approx(colour, abs=0.01)
