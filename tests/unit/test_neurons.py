"""Neurons matched by activation, against plain float64 arithmetic and networks that hide one another."""

from __future__ import annotations

from itertools import permutations

import numpy
import pytest
import torch
from torch.nn.functional import silu

from workers.diagnostics.neurons import FeedForward, chance_correlation, match_neurons


def network(neurons: int, hidden: int, seed: int) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(neurons, hidden, generator=generator) for _ in range(3))
    return FeedForward(gate, up, down.T.contiguous())


def states(tokens: int, hidden: int, seed: int = 99) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def picked(parent: FeedForward, order: list[int], signs: list[int] | None = None) -> FeedForward:
    """Neurons of a network in another order; a sign of -1 flips up and down together."""
    sign = torch.tensor([1.0] * len(order) if signs is None else [float(s) for s in signs])
    return FeedForward(
        parent.gate[order], parent.up[order] * sign[:, None], parent.down[:, order] * sign
    )


def test_correlations_and_assignment_are_those_of_the_plain_formula() -> None:
    father, mother, inputs = network(4, 6, 1), network(5, 6, 2), states(3000, 6)
    x = inputs.double().numpy()

    def activations(parent: FeedForward) -> numpy.ndarray:
        gate = x @ parent.gate.double().numpy().T
        return gate / (1 + numpy.exp(-gate)) * (x @ parent.up.double().numpy().T)

    both = numpy.corrcoef(activations(father).T, activations(mother).T)[:4, 4:]
    best = max(
        permutations(range(5), 4),
        key=lambda places: sum(abs(both[own, hers]) for own, hers in enumerate(places)),
    )
    found = match_neurons(inputs, silu, father, mother, 0.0)
    assert tuple(found.mother) == best
    expected = both[range(4), list(best)]
    numpy.testing.assert_allclose(found.correlation, abs(expected), atol=1e-5)
    assert list(found.flipped) == list(expected < 0)
    own, hers = activations(father), activations(mother)[:, list(best)]
    loudness = [
        numpy.sqrt(numpy.square(a @ d.double().numpy().T).sum())
        for a, d in ((own, father.down), (hers, mother.down[:, list(best)]))
    ]
    assert found.scale == pytest.approx(loudness[0] / loudness[1], rel=6e-3)


def test_permuted_and_flipped_neurons_are_found_exactly() -> None:
    father, inputs = network(64, 16, 1), states(1500, 16)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5)).tolist()
    signs = [1 if n % 3 else -1 for n in range(64)]
    mother = picked(father, order, signs)
    least = chance_correlation(inputs, silu, father, mother)
    assert 0 < least < 0.99
    found = match_neurons(inputs, silu, father, mother, least)
    assert [order[place] for place in found.mother] == list(range(64))
    assert list(found.flipped) == [signs[place] < 0 for place in found.mother]
    assert found.scale == 1.0
    assert found.correlation.min() > 0.9999


@pytest.mark.parametrize("extra", [0, 30])
def test_widths_may_differ(extra: int) -> None:
    """A mother with 10 of the father's 16 neurons, and `extra` of her own."""
    father, inputs = network(16, 24, 1), states(1500, 24)
    order = [15, 3, 8, 0, 11, 5, 6, 14, 9, 2]
    known, own = picked(father, order), network(extra, 24, 7)
    mother = FeedForward(
        torch.cat([known.gate, own.gate]),
        torch.cat([known.up, own.up]),
        torch.cat([known.down, own.down], 1),
    )
    found = match_neurons(inputs, silu, father, mother, 0.9)
    assert {n: int(place) for n, place in enumerate(found.mother) if place >= 0} == {
        neuron: place for place, neuron in enumerate(order)
    }
    assert found.moved == 10
    assert found.scale == 1.0


def test_louder_neurons_are_scaled_down() -> None:
    father, inputs = network(16, 8, 1), states(500, 8)
    mother = FeedForward(father.gate, father.up, father.down * 4)
    assert match_neurons(inputs, silu, father, mother, 0.5).scale == 0.25


def test_neurons_that_never_vary_match_nothing() -> None:
    father, inputs = network(8, 8, 1), states(500, 8)
    father.up[3] = 0
    mother = picked(father, list(range(8)))
    found = match_neurons(inputs, silu, father, mother, 0.0)
    assert found.mother.tolist() == [0, 1, 2, -1, 4, 5, 6, 7]


def test_networks_that_have_nothing_in_common_are_not_beyond_chance() -> None:
    father, mother, inputs = network(200, 32, 1), network(200, 32, 2), states(2000, 32)
    least = chance_correlation(inputs, silu, father, mother)
    assert match_neurons(inputs, silu, father, mother, 0.0).moved == 200
    assert match_neurons(inputs, silu, father, mother, least).moved <= 2


def test_states_of_low_precision_are_computed_with_in_fp32() -> None:
    father, inputs = network(32, 16, 1), states(800, 16).bfloat16()
    found = match_neurons(inputs, silu, father, picked(father, list(range(31, -1, -1))), 0.9)
    assert found.mother.tolist() == list(range(31, -1, -1))
