"""Facts about whole tensors, found by many threads together."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_files import open_merger, rule, write_checkpoint
from workers.merging import Recipe
from workers.merging.sources import TORCH_DTYPES
from workers.merging.statistics import SharedScan


class Sum:
    """Of the numbers of the stretches, unless it breaks at a step."""

    def __init__(self, number: int, breaks_at: str = "") -> None:
        self.total, self.breaks_at = number, breaks_at

    def update(self, piece: Any) -> None:
        raise AssertionError

    def merge(self, other: Any) -> None:
        if self.breaks_at == "merge":
            raise ValueError("merge broke")
        self.total += other.total

    def finish(self) -> int:
        if self.breaks_at == "finish":
            raise ValueError("finish broke")
        return self.total


@pytest.mark.parametrize("step", ["scan", "merge", "finish"])
def test_what_breaks_a_scan_reaches_every_thread_that_waits_for_it(step: str) -> None:
    together = threading.Barrier(2)

    def scan(stretch: int) -> Sum:
        together.wait(60)  # so that one of the threads has to wait for the other
        if step == "scan":
            raise ValueError("scan broke")
        return Sum(stretch, step)

    shared = SharedScan(2, scan)
    errors: list[str] = []

    def ask() -> None:
        try:
            shared.result()
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [f"{step} broke"] * 2


def test_what_was_found_of_one_form_of_child_is_not_used_for_another(tmp_path: Path) -> None:
    """Layer 0 of stacked layers may be another one than layer 0 of the parents."""
    generator = torch.Generator().manual_seed(3)
    folders = {
        name: write_checkpoint(
            tmp_path / name,
            {
                f"model.layers.{layer}.mlp.up_proj.weight": scale
                * torch.randn(20, 30, generator=generator)
                for layer, scale in enumerate((1.0, 100.0))
            },
        )
        for name in ("base", "a", "b")
    }

    def merged(layers: tuple[Any, ...], *earlier: tuple[Any, ...]) -> torch.Tensor:
        merger = open_merger({name: folders[name] for name in "ab"}, folders["base"])
        rules = (rule("ties", weight=1.0, density=0.3),)
        values = torch.empty(0)
        for form in (*earlier, layers):
            recipe = Recipe(merger.references, rules, merger.base_reference, layers=form)
            (tensor, *_) = merger.start(recipe).plan.child.tensors
            values = torch.empty(tensor.elements, dtype=TORCH_DTYPES[tensor.dtype])
            merger.realize(recipe, {tensor.name: values})
        return values

    upper = ({"a": (1, 1), "b": (1, 1)},)
    assert torch.equal(merged(upper, ()), merged(upper))
