"""HARC against a dense solve of its equation, and where its solution is known."""

from __future__ import annotations

import pytest
import torch

from workers.errors import BadInputError
from workers.experts import harc
from workers.experts.harc import Donor, calibrate

EXPERTS, CHANNELS = 4, 8


def donors(count: int, seed: int = 0, prompts: int = 3) -> list[Donor]:
    """Random routers that prefer experts, and random hidden states whose channels are of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(0.3, 3.0, CHANNELS)
    return [
        Donor(
            torch.randn(EXPERTS, CHANNELS, generator=generator),
            [
                torch.randn(9 + number, CHANNELS, generator=generator) * sizes
                for number in range(prompts)
            ],
        )
        for _ in range(count)
    ]


def start(seed: int = 9) -> torch.Tensor:
    return torch.randn(EXPERTS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def dense(given: list[Donor], shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The equation written out: the matrix `[E H, E H]`, token by token, and its right side."""
    size = EXPERTS * CHANNELS
    matrix = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, dtype=torch.float64)
    for donor in given:
        own = torch.zeros_like(matrix)
        tokens = 0
        for x in torch.cat(list(donor.states)).double():
            p = torch.softmax(donor.router.double() @ x, 0)
            hessian = torch.diag(p) - torch.outer(p, p)
            own += torch.kron(hessian, torch.outer(x, x))
            tokens += 1
        own /= tokens
        own = shrink * own + (1 - shrink) * torch.diag(torch.diagonal(own))
        matrix += own
        right += own @ donor.router.double().reshape(-1)
    return matrix, right


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_solution_is_that_of_a_dense_solve(count: int) -> None:
    given = donors(count)
    matrix, right = dense(given, 0.9)
    wanted = torch.linalg.solve(matrix, right).view(EXPERTS, CHANNELS)
    found = calibrate(start(), given, tolerance=1e-13)
    assert torch.allclose(found.router, wanted, rtol=0, atol=1e-9)
    before = torch.linalg.vector_norm(right - matrix @ start().double().reshape(-1))
    assert found.start == pytest.approx(float(before / torch.linalg.vector_norm(right)))


def test_without_shrinking_what_all_experts_have_in_common_stays_that_of_the_start() -> None:
    """The matrix is singular then: routers that differ by one row added to all route alike. Of all
    solutions it is the one nearest to the start."""
    given = donors(2)
    matrix, right = dense(given, 1.0)
    first = start().double().reshape(-1)
    wanted = first + torch.linalg.pinv(matrix, rtol=1e-12) @ (right - matrix @ first)
    found = calibrate(start(), given, shrink=1.0, tolerance=1e-13)
    assert torch.allclose(found.router.reshape(-1), wanted, rtol=0, atol=1e-8)
    assert torch.allclose(found.router.mean(0), start().double().mean(0), rtol=0, atol=1e-10)


def test_the_router_of_a_single_donor_comes_back() -> None:
    (donor,) = donors(1)
    found = calibrate(start(), [donor], tolerance=1e-13)
    assert torch.allclose(found.router, donor.router.double(), rtol=0, atol=1e-9)
    # With nothing shrunk as far as it can be told: up to what all experts have in common.
    found = calibrate(start(), [donor], shrink=1.0, tolerance=1e-13)
    assert not torch.allclose(found.router, donor.router.double(), rtol=0, atol=1e-2)
    states = torch.cat(list(donor.states)).double()
    routing = (states @ found.router.T).softmax(-1)
    assert torch.allclose(routing, (states @ donor.router.double().T).softmax(-1), atol=1e-9)


def test_a_solution_is_the_minimum_of_the_second_order_divergence() -> None:
    """Of both donors' 1/2 y^T H y, with nothing shrunk; no small step away from it makes that less."""
    given = donors(2)
    found = calibrate(start(), given, shrink=1.0, tolerance=1e-13).router

    def divergence(router: torch.Tensor) -> float:
        total = 0.0
        for donor in given:
            own = [(p, x) for x in torch.cat(list(donor.states)).double()
                   for p in [torch.softmax(donor.router.double() @ x, 0)]]  # fmt: skip
            parts = []
            for p, x in own:
                y = (router - donor.router.double()) @ x
                parts.append(0.5 * float((p * y * y).sum() - (p * y).sum() ** 2))
            total += sum(parts) / len(parts)
        return total

    least = divergence(found)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = torch.randn(EXPERTS, CHANNELS, generator=generator, dtype=torch.float64)
        assert divergence(found + 0.01 * step) > least
    for donor in given:
        assert divergence(donor.router.double()) > least


def test_states_in_bf16_and_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model computes them, and no more of them in float64 at a time than fit."""
    given = [Donor(d.router, [s.bfloat16() for s in d.states]) for d in donors(2)]
    matrix, right = dense(given, 0.9)
    monkeypatch.setattr(harc, "BLOCK_ELEMENTS", 4 * CHANNELS)
    found = calibrate(start(), given, tolerance=1e-13)
    wanted = torch.linalg.solve(matrix, right).view(EXPERTS, CHANNELS)
    assert torch.allclose(found.router, wanted, rtol=0, atol=1e-9)


def test_it_ends_at_the_tolerance_or_when_it_may_go_no_further() -> None:
    given = donors(2)
    loose, tight = (calibrate(start(), given, tolerance=t) for t in (1e-2, 1e-8))
    assert loose.residual <= 1e-2 and tight.residual <= 1e-8
    assert 0 < loose.iterations < tight.iterations
    cut = calibrate(start(), given, iterations=2)
    assert cut.iterations == 2 and cut.residual > 1e-6
    again = calibrate(tight.router, given, tolerance=1e-7)
    assert again.iterations == 0 and torch.equal(again.router, tight.router)


def test_an_expert_that_is_never_likely_does_not_break_it() -> None:
    """Its chances underflow to 0: the equation says nothing of its row, which stays what it was."""
    (donor,) = donors(1)
    router = donor.router.clone()
    router[2] = 0.0
    states = [torch.cat([s, torch.ones(len(s), 1)], 1) for s in donor.states]
    bias = torch.tensor([0.0, 0.0, -2000.0, 0.0])
    certain = Donor(torch.cat([router, bias[:, None]], 1), states)
    first = torch.randn(EXPERTS, CHANNELS + 1, generator=torch.Generator().manual_seed(2))
    found = calibrate(first, [certain])
    assert found.router.isfinite().all()
    assert torch.equal(found.router[2], first[2].double())
    assert found.residual <= 1e-6


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    """Instead of the router that it was started from, with nothing left to solve."""
    (donor,) = donors(1)
    broken = [states.clone() for states in donor.states]
    broken[-1][0, 0] = value
    router = donor.router.clone()
    router[1, 1] = value
    for given in (Donor(donor.router, broken), Donor(router, donor.states)):
        with pytest.raises(BadInputError, match="not finite"):
            calibrate(start(), [given])
