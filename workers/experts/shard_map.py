"""The shard map: which worker owns which part of a model. Plain data, made from headers alone.

The smallest thing that is owned is a *unit*: all matrices of one expert of one layer, or one tensor of
anything else. Every worker owns the same bytes, within what units allow, and its part of the experts of
every layer, so that all workers have work on any range of layers. When a worker comes or goes, only what
must move does. How the units are dealt out is our own choice; it depends on nothing but the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heapreplace

from workers.checkpoints import LogicalTensor
from workers.checkpoints.safetensors_format import BITS_PER_ELEMENT

Unit = str | tuple[int, int]
"""A tensor's name, or (layer, expert)."""

OUTSIDE_LAYERS = -1
"""Stands for the layer of an expert that has none."""

SLACK = 0.015
"""By so much of its share a worker may own more or less than others of what is no expert before experts make
up for it: below, all workers have the same number of experts of a layer, give or take one."""


@dataclass(frozen=True)
class ShardMap:
    """Owners of all units of one model. Equal arguments and equal changes make equal maps."""

    workers: tuple[str, ...]
    lead: str | None
    """Who owns everything that is no expert, if anybody does; and so many experts less."""
    tensors: tuple[LogicalTensor, ...]
    owners: dict[Unit, str]

    @staticmethod
    def of(
        tensors: Sequence[LogicalTensor], workers: Sequence[str], lead: str | None = None
    ) -> ShardMap:
        """Deal the model out. Experts that are stored one after the other stay together on a worker.

        No worker owns more than its even share, 1 % of it and the largest unit. So all are within 2 % of
        the share where no unit is larger than 1 % of it, as in large mixtures of experts; in small models
        `imbalance` says what it came to. Only a `lead` may own more: everything that is no expert.
        """
        if not workers or len(set(workers)) < len(workers) or lead not in (None, *workers):
            raise ValueError(
                f"workers {workers} must be different, and one of them the lead {lead}"
            )
        dealer = _Dealer(tuple(tensors), tuple(workers), lead, {})
        dealer.place()
        return dealer.result()

    def owner(self, tensor: LogicalTensor) -> str:
        """Who owns a tensor, of any parent: those of one layer and expert, or of one name, go together.

        Raises `KeyError` for a tensor that the map was not made of.
        """
        return self.owners[unit_of(tensor)]

    def tensors_of(self, worker: str) -> tuple[LogicalTensor, ...]:
        """What a worker owns, in the order that the tensors were given in."""
        return tuple(self._owned[worker])

    def bytes_of(self, worker: str) -> int:
        """Stored bytes of what a worker owns."""
        return sum(stored_bytes(tensor) for tensor in self._owned[worker])

    @property
    def imbalance(self) -> float:
        """By how much the worker that is farthest from the even share is off, as a part of the share."""
        sizes = [self.bytes_of(worker) for worker in self.workers]
        share = sum(sizes) / len(sizes)
        return max(abs(size - share) for size in sizes) / share if share else 0.0

    def without(self, worker: str) -> ShardMap:
        """The map when a worker is lost: its units go to the others, and nothing else moves.

        After a lead, the first of the others leads.
        """
        if worker not in self.workers or len(self.workers) == 1:
            raise ValueError(f"{worker!r} is none of {self.workers}, or the last one")
        left = tuple(other for other in self.workers if other != worker)
        lead = left[0] if worker == self.lead else self.lead
        kept = {unit: owner for unit, owner in self.owners.items() if owner != worker}
        dealer = _Dealer(self.tensors, left, lead, kept)
        dealer.place()
        return dealer.result()

    def with_worker(self, worker: str) -> ShardMap:
        """The map when a worker joins: it receives its share from the others, and nothing else moves."""
        if worker in self.workers:
            raise ValueError(f"{worker!r} is there already")
        dealer = _Dealer(self.tensors, (*self.workers, worker), self.lead, dict(self.owners))
        dealer.give_to(worker)
        return dealer.result()

    @cached_property
    def _owned(self) -> dict[str, list[LogicalTensor]]:
        owned: dict[str, list[LogicalTensor]] = {worker: [] for worker in self.workers}
        for tensor in self.tensors:
            owned[self.owner(tensor)].append(tensor)
        return owned


def unit_of(tensor: LogicalTensor) -> Unit:
    """What of a model is owned together with this tensor."""
    if tensor.expert is None:
        return tensor.name
    return OUTSIDE_LAYERS if tensor.layer is None else tensor.layer, tensor.expert


def stored_bytes(tensor: LogicalTensor) -> int:
    """Bytes of a tensor as it is stored, without the block scales of FP8 codes."""
    return tensor.elements * BITS_PER_ELEMENT[tensor.dtype] // 8


class _Dealer:
    """A map in the making."""

    def __init__(
        self,
        tensors: tuple[LogicalTensor, ...],
        workers: tuple[str, ...],
        lead: str | None,
        owners: dict[Unit, str],
    ) -> None:
        self.tensors, self.workers, self.lead, self.owners = tensors, workers, lead, owners
        self.sizes: dict[Unit, int] = {}
        for tensor in tensors:
            unit = unit_of(tensor)
            self.sizes[unit] = self.sizes.get(unit, 0) + stored_bytes(tensor)
        self.layers: dict[int, list[Unit]] = {}
        """Layer -> its experts, as they are stored."""
        self.others: list[Unit] = []
        """What is no expert, the largest first."""
        for unit in self.sizes:
            if isinstance(unit, tuple):
                self.layers.setdefault(unit[0], []).append(unit)
            else:
                self.others.append(unit)
        self.others.sort(key=lambda unit: -self.sizes[unit])
        self.held_others = dict.fromkeys(workers, 0)
        for unit in self.others:
            if unit in owners:
                self.held_others[owners[unit]] += self.sizes[unit]

    def result(self) -> ShardMap:
        owners = {unit: self.owners[unit] for unit in self.sizes}
        return ShardMap(self.workers, self.lead, self.tensors, owners)

    def _own(self, unit: Unit, worker: str) -> None:
        if isinstance(unit, str):
            if unit in self.owners:
                self.held_others[self.owners[unit]] -= self.sizes[unit]
            self.held_others[worker] += self.sizes[unit]
        self.owners[unit] = worker

    # -- units that nobody owns --------------------------------------------------------------

    def place(self) -> None:
        """Give every unit without an owner to one."""
        for unit in self.others:
            if unit not in self.owners:
                lightest = min(self.workers, key=lambda one: self.held_others[one])
                self._own(unit, self.lead or lightest)
        shares = self._expert_shares()
        expected = self._expect(shares)
        for layer in self._layers(shares):
            self._place_experts(layer, expected)

    def _place_experts(self, layer: _Layer, expected: dict[str, float]) -> None:
        """Each to the worker that lacks most whole experts of this layer; among equals, to the one that is
        expected to end lightest."""
        free = [unit for unit in layer.units if unit not in self.owners]
        free.sort(key=lambda unit: -self.sizes[unit])

        def turn(number: int) -> tuple[int, float, int]:
            worker = self.workers[number]
            return -_whole(layer.lacking[worker] / layer.largest), end[worker], number

        end = {worker: expected[worker] - layer.lacking[worker] for worker in self.workers}
        heap = [turn(number) for number in range(len(self.workers))]
        heapify(heap)
        chosen: list[int] = []
        for unit in free:
            number = heap[0][2]
            chosen.append(number)
            layer.lacking[self.workers[number]] -= self.sizes[unit]
            end[self.workers[number]] += self.sizes[unit]
            heapreplace(heap, turn(number))
        if free and self.sizes[free[0]] == self.sizes[free[-1]]:
            chosen.sort()  # all the same to the balance: neighbours in the file go together
        for unit, number in zip(free, chosen, strict=True):
            self._own(unit, self.workers[number])
        expected |= end

    # -- a worker that joins -----------------------------------------------------------------

    def give_to(self, newcomer: str) -> None:
        """Let the others give their share to a worker that has nothing."""
        if self.lead is None:
            mean = sum(self.held_others.values()) / len(self.workers)
            for unit in self.others:
                half = self.sizes[unit] / 2
                giver = self.held_others[self.owners[unit]]
                if self.held_others[newcomer] + half <= mean <= giver - half:
                    self._own(unit, newcomer)
        shares = self._expert_shares()
        expected = self._expect(shares)
        wanted = 0.0
        for layer in self._layers(shares):
            wanted = self._give_experts(newcomer, layer, expected, wanted + layer.lacking[newcomer])

    def _give_experts(
        self, newcomer: str, layer: _Layer, expected: dict[str, float], wanted: float
    ) -> float:
        """Experts of one layer, each from the worker that has most whole ones too many; among equals, from
        the one that is expected to end heaviest. Returns what is left of the `wanted` bytes."""
        owned: dict[str, list[Unit]] = {}
        for unit in layer.units:
            owned.setdefault(self.owners[unit], []).append(unit)

        def turn(number: int) -> tuple[int, float, int]:
            worker = self.workers[number]
            return -_whole(-layer.lacking[worker] / layer.largest), -end[worker], number

        end = {worker: expected[worker] - layer.lacking[worker] for worker in self.workers}
        heap = [turn(number) for number, worker in enumerate(self.workers) if worker in owned]
        heapify(heap)
        while heap:
            number = heap[0][2]
            giver = self.workers[number]
            size = self.sizes[owned[giver][-1]]
            if wanted < size / 2:
                break
            self._own(owned[giver].pop(), newcomer)
            wanted -= size
            for worker, change in ((giver, -size), (newcomer, size)):
                layer.lacking[worker] -= change
                end[worker] += change
            if owned[giver]:
                heapreplace(heap, turn(number))
            else:
                heappop(heap)
        expected |= end
        return wanted

    # -- what would be even ------------------------------------------------------------------

    def _layers(self, shares: dict[str, float]) -> Iterator[_Layer]:
        for _, units in sorted(self.layers.items()):
            total = sum(self.sizes[unit] for unit in units)
            lacking = {worker: shares[worker] * total for worker in self.workers}
            for unit in units:
                if unit in self.owners:
                    lacking[self.owners[unit]] -= self.sizes[unit]
            yield _Layer(units, max(1, *(self.sizes[unit] for unit in units)), lacking)

    def _expect(self, shares: dict[str, float]) -> dict[str, float]:
        """What workers would end with if each had exactly its share of every layer's experts."""
        experts = sum(self.sizes.values()) - sum(self.held_others.values())
        return {worker: self.held_others[worker] + shares[worker] * experts for worker in shares}

    def _expert_shares(self) -> dict[str, float]:
        """What part of each layer's experts a worker is to own, so that all come to own the same bytes."""
        experts = sum(self.sizes.values()) - sum(self.held_others.values())
        others = sorted(self.held_others.values())
        count = len(others)
        while count * others[count - 1] > experts + sum(others[:count]):
            count -= 1  # it has more than an even share without any expert
        level = (experts + sum(others[:count])) / count
        room = {worker: max(0.0, level - self.held_others[worker]) for worker in self.workers}
        equals = [worker for worker in self.workers if worker != self.lead]
        mean = sum(room[worker] for worker in equals) / max(len(equals), 1)
        if all(abs(room[worker] - mean) <= SLACK * level for worker in equals):
            room |= dict.fromkeys(equals, mean)
        return {worker: size / max(experts, 1) for worker, size in room.items()}


@dataclass
class _Layer:
    """The experts of one layer."""

    units: list[Unit]
    """As they are stored."""
    largest: int
    lacking: dict[str, float]
    """Worker -> bytes that it has less than its share of this layer; negative if more."""


def _whole(count: float) -> int:
    """Rounded down, but for what the rounding of floats has taken off."""
    return math.floor(count + 1e-6)
