"""UVC's primal-dual method: golden values, what never moves, and that it ends at the budget."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmcompress.ops.primal_dual import (
    DUAL,
    GATE,
    OPEN,
    PRESSURE,
    PRIMAL,
    SHRINK,
    Prices,
    PrimalDual,
    least_sums,
    pace,
    sampled_gates,
    shrinking,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def prices(budget: float = 0.7) -> Prices:
    # Two groups in a block that can be skipped, one in a block that cannot; 12 + 8 + 20 = 40 of 50, and 4 more go with the block.
    return Prices(
        units=doubles(4, 8, 10),
        most=doubles(3, 7, 9),
        unit_costs=doubles(3, 1, 2) / 50,
        block=torch.tensor([0, 0, -1]),
        blocks=doubles(24) / 50,
        budget=budget,
    )


def test_the_sum_of_the_smallest_and_its_slope() -> None:
    ordered = doubles(1, 3, 4, 0)[None].repeat(5, 1)
    # The ceiling of 1.2 is 2; of all three nothing is left to add.
    value, slope = least_sums(ordered, doubles(2, 1.2, 0, 0.1, 3))
    assert value.tolist() == [4, 4, 0, 1, 8]
    assert slope.tolist() == [4, 4, 1, 3, 0]


def test_the_whole_costs_exactly_one() -> None:
    assert float(prices().cost(doubles(0, 0, 0), doubles(1))) == 1.0
    assert PrimalDual(prices()).cost == 1.0


def test_costs_by_hand() -> None:
    # 2 * 3 + 4 * 1 units' cost, kept by half, 5 * 2, and half of 24.
    assert float(prices().cost(doubles(2, 4, 5), doubles(0.5))) == pytest.approx(1 - (5 + 10 + 12) / 50)
    # A mean group costs 40 / 3. The block saves 24 less the 10 that are gone anyway.
    assert prices().savings(doubles(0.5)).tolist() == pytest.approx([0.45, 0.3, 1.5])
    assert prices().block_savings(doubles(2, 4, 5)).tolist() == pytest.approx([14 * 3 / 40])


def test_savings_are_the_slopes_of_the_cost() -> None:
    made = prices()
    removed, keep = doubles(2, 4, 5).requires_grad_(), doubles(0.6).requires_grad_()
    made.cost(removed, keep).backward()
    assert removed.grad is not None
    assert keep.grad is not None
    mean = 40 / 3 / 50
    assert (-removed.grad * made.units / mean).tolist() == pytest.approx(made.savings(keep.detach()).tolist())
    assert (keep.grad / mean).tolist() == pytest.approx(made.block_savings(removed.detach()).tolist())


def test_without_multipliers_nothing_moves() -> None:
    state = PrimalDual(prices(budget=1 - 1e-9))
    state.removed.copy_(doubles(2, 3.5, 0))
    state.duals.zero_()
    for tick in range(50):
        before = state.removed.clone(), state.logits.clone()
        state.pressure.zero_()
        state.duals.zero_()
        state.step(torch.rand(3, 11, dtype=torch.float64), doubles(0), 0.02)
        assert torch.equal(state.removed, before[0]), tick
        assert torch.equal(state.logits, before[1])


def test_one_step_by_hand() -> None:
    state = PrimalDual(prices())
    state.removed.copy_(doubles(1, 0, 4))
    state.duals.copy_(doubles(1, 2, 2))
    state.pressure.fill_(0.5)
    state.excess.copy_(state._excess())
    shares = torch.zeros(3, 11, dtype=torch.float64)
    shares[0, :4] = doubles(0.1, 0.2, 0.3, 0.4)
    shares[1, :8] = 0.125
    shares[2, :10] = 0.1
    state.step(shares, doubles(0.25), 0.001)
    # y times the next share times U, less z, times what the group costs (0.9, 0.6, 1.5 of the mean); the last, 2.25, is clipped.
    assert state.removed.tolist() == pytest.approx(
        [1 - PRIMAL * 0.001 * 0.9 * (0.8 - 0.5) * 4, 0, 4 - PRIMAL * 0.001 * 10]
    )
    assert state.duals.tolist() == pytest.approx([1 + DUAL * 0.001 * 0.1, 2, 2 + DUAL * 0.001 * 0.4])
    # The block costs 24 of 40 / 3, and would save 3 less, before s moved.
    assert float(OPEN + GATE * 0.001 * (0.25 * 1.8 - 0.5 * 1.575)) == pytest.approx(float(state.logits))
    assert float(state.excess) == pytest.approx((state.cost - 0.7) / 0.3)
    assert float(state.pressure) > 0.5


def test_the_multiplier_rises_above_the_budget_and_falls_below_it_to_zero() -> None:
    state, flat = PrimalDual(prices()), torch.zeros(3, 11, dtype=torch.float64)
    state.duals.zero_()
    state.step(flat, doubles(0), 0.01)
    assert float(state.pressure) == pytest.approx(PRESSURE * 0.01)  # excess 1, and nothing has moved
    state.removed.copy_(state.prices.most)
    state.excess.copy_(state._excess())
    for _ in range(100):
        state.step(flat, doubles(5), 0.01)
    assert float(state.pressure) == 0


def toy(seed: int, layers: int, blocks: bool, budget: float, steps: int) -> PrimalDual:
    """Return the end of a search over heads of nearly equal norms and neurons of unequal ones, which shrink."""
    generator = torch.Generator().manual_seed(seed)
    norms: list[Tensor] = []
    for _ in range(layers):
        norms.append(1 + 0.3 * torch.rand(6, generator=generator, dtype=torch.float64))
        norms.append(0.1 + 2 * torch.rand(64, generator=generator, dtype=torch.float64))
    total = layers * (6 * 32 + 64 * 3) * 1.4
    made = Prices(
        units=doubles(*[6, 64] * layers),
        most=doubles(*[5, 60] * layers),
        unit_costs=doubles(*[32, 3] * layers) / total,
        block=torch.arange(layers).repeat_interleave(2) if blocks else torch.full((2 * layers,), -1),
        blocks=doubles(*[6 * 32 + 64 * 3 + 8.0] * (layers if blocks else 0)) / total,
        budget=budget,
    )
    state = PrimalDual(made)
    use = 0.5 + torch.rand(len(made.blocks), generator=generator, dtype=torch.float64)
    for step in range(steps):
        for own, removed, dual in zip(norms, state.removed.tolist(), state.duals.tolist(), strict=True):
            own[own.argsort()[: math.ceil(removed)]] *= shrinking(dual, 1 / steps) ** 2
        state.advance(norms, -use, pace(step, steps), ticks=400 // steps)
    return state


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("layers", "budget"), [(4, 0.85), (4, 0.7), (12, 0.6)])
def test_it_ends_at_the_budget(layers: int, budget: float, blocks: bool) -> None:
    for seed in range(2):
        state = toy(seed, layers, blocks, budget, steps=40)
        assert abs(state.cost - budget) < 0.01
        assert float(state.pressure) > 0


def test_what_nothing_needs_goes_first() -> None:
    made = Prices(doubles(8, 8), doubles(7, 7), doubles(1, 1) / 16, torch.tensor([-1, -1]), doubles(), 0.75)
    state = PrimalDual(made)
    even, uneven = torch.ones(8, dtype=torch.float64), doubles(1, 1, 1, 0, 0, 0, 0, 0) + 1e-6
    for step in range(40):
        state.advance([even, uneven], doubles(), pace(step, 40), ticks=10)
    # The last of the five is left to the other group's first: a slope looks one unit ahead.
    assert state.removed[1] > 3.9
    assert state.removed[0] < 0.1


def test_steps_fall_and_take_the_whole_time() -> None:
    times = [pace(step, 7) for step in range(7)]
    assert sum(times) == pytest.approx(1)
    assert times == sorted(times, reverse=True)
    assert min(times) > 0


def test_shrinking_is_the_proximal_step() -> None:
    # argmin of (v - w)^2 / 2 + t y v^2 at t = SHRINK * time
    assert shrinking(2.0, 0.1) == pytest.approx(1 / (1 + 2 * SHRINK * 0.2))
    assert shrinking(0.0, 0.1) == 1


def test_gates_are_drawn_by_seed_and_are_open_as_often_as_they_should() -> None:
    logits = torch.full((4000,), 1.0, dtype=torch.float64)
    drawn = sampled_gates(logits, 3)
    assert torch.equal(drawn, sampled_gates(logits, 3))
    assert not torch.equal(drawn, sampled_gates(logits, 4))
    # A relaxed gate is above a half just when the gate itself is open: probability sigmoid(1), here within 4 deviations.
    assert float((drawn > 0.5).double().mean()) == pytest.approx(0.7311, abs=4 * math.sqrt(0.7311 * 0.2689 / 4000))
