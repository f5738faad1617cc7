"""Few rules that give each tensor its own way of being merged, written by component, layer and place."""

from __future__ import annotations

import glob
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from workers.checkpoints import LogicalTensor
from workers.merging import Selector

Way = TypeVar("Way", bound=Hashable)
Span = tuple[int, int]


def cover(
    tensors: Sequence[LogicalTensor], way_of: Callable[[LogicalTensor], Way]
) -> list[tuple[Selector, Way]]:
    """Selectors with a way each: the first that matches a tensor has that tensor's way.

    A component whose tensors agree takes one selector; else a run of layers that do; else all its experts
    that agree, by their places; else the tensors are named.
    """
    found: dict[tuple[Span | None, Way], list[str]] = {}
    placed: dict[tuple[str, Way], dict[int, list[Span]]] = {}
    named: dict[tuple[str, int | None, Way], list[str]] = {}

    def add(component: str, layers: Span | None, way: Way) -> None:
        found.setdefault((layers, way), []).append(component)

    for component, own in _grouped(tensors, lambda tensor: tensor.component).items():
        in_all = {way_of(tensor) for tensor in own}
        if len(in_all) == 1:
            add(component, None, in_all.pop())
            continue
        agreeing: list[tuple[int, Way]] = []
        for layer, part in _grouped(own, lambda tensor: tensor.layer).items():
            ways = {way_of(tensor) for tensor in part}
            if len(ways) == 1 and layer is None:
                add(component, None, ways.pop())
            elif len(ways) == 1 and layer is not None:
                agreeing.append((layer, ways.pop()))
            elif layer is not None and (experts := _by_expert(part, way_of)):
                for span, way in _runs(experts):
                    placed.setdefault((component, way), {}).setdefault(layer, []).append(span)
            else:
                for tensor in part:
                    name = glob.escape(tensor.name)
                    named.setdefault((component, layer, way_of(tensor)), []).append(name)
        for span, way in _runs(agreeing):
            add(component, span, way)
    rules = [
        (
            Selector((component,), None if layer is None else (layer, layer), names=tuple(names)),
            way,
        )
        for (component, layer, way), names in named.items()
    ]
    # The narrower selectors first: what they leave is for those that select whole components.
    rules += [
        (
            Selector(
                (component,),
                places=tuple((layer, tuple(spans)) for layer, spans in sorted(own.items())),
            ),
            way,
        )
        for (component, way), own in placed.items()
    ]
    order = sorted(found, key=lambda key: key[0] is None)
    return rules + [(Selector(tuple(found[key]), key[0]), key[1]) for key in order]


Key = TypeVar("Key")


def _grouped(
    tensors: Iterable[LogicalTensor], key_of: Callable[[LogicalTensor], Key]
) -> dict[Key, list[LogicalTensor]]:
    groups: dict[Key, list[LogicalTensor]] = {}
    for tensor in tensors:
        groups.setdefault(key_of(tensor), []).append(tensor)
    return groups


def _by_expert(
    tensors: list[LogicalTensor], way_of: Callable[[LogicalTensor], Way]
) -> list[tuple[int, Way]]:
    """The way of each expert; empty if not each has one."""
    ways: dict[int, Way] = {}
    for tensor in tensors:
        if tensor.expert is None or ways.setdefault(tensor.expert, way_of(tensor)) != way_of(
            tensor
        ):
            return []
    return list(ways.items())


def _runs(ways: list[tuple[int, Way]]) -> list[tuple[Span, Way]]:
    """Numbers that follow one another among those that there are, and agree, as spans."""
    runs: list[tuple[Span, Way]] = []
    for number, way in sorted(ways, key=lambda pair: pair[0]):
        if runs and runs[-1][1] == way:
            runs[-1] = (runs[-1][0][0], number), way
        else:
            runs.append(((number, number), way))
    return runs
