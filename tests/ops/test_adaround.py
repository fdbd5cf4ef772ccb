"""AdaRound: h and its regulariser by hand, and what learned rounding promises beside nearest and beside every choice there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmcompress.ops import adaround as module
from mmcompress.ops.adaround import adaround, annealed, rectified, regulariser, slope
from mmcompress.ops.gptq import output_error
from mmcompress.ops.grouped import nearest_grid, on_grid
from mmcompress.ops.half_quadratic import half_quadratic_grid
from mmcompress.ops.rounding import Levels

Grid = Callable[[Tensor, int], tuple[Tensor, Tensor]]
WHOLE = Levels(-9, 9, torch.int8, symmetric=True)


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made[:, ::17] *= 6
    made[:, 5] = 0
    return made


def correlated(columns: int = 64, tokens: int = 400, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(0.1, 2, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return inputs.T @ inputs / tokens


def integers(rows: int = 1) -> tuple[Tensor, Tensor, Levels]:
    """The grid of whole numbers."""
    return torch.ones(rows, 1), torch.zeros(rows, 1), WHOLE


def test_the_part_of_a_step_by_hand() -> None:
    """Sigmoids 1/2, 3/4, 11/12, 1/12 and nearly 1 and 0, times 1.2, less 0.1."""
    values = torch.tensor([0.0, math.log(3), math.log(11), -math.log(11), 10.0, -10.0])
    torch.testing.assert_close(rectified(values), torch.tensor([0.5, 0.8, 1.0, 0.0, 1.0, 0.0]))
    assert rectified(values)[4:].tolist() == [1, 0]  # cut off, not nearly there


def test_the_regulariser_by_hand() -> None:
    parts = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert regulariser(parts, 2.0).tolist() == [0, 0.75, 1, 0.75, 0]
    assert regulariser(parts, 20.0).tolist() == [0, 1 - 2.0**-20, 1, 1 - 2.0**-20, 0]
    assert slope(parts, 2.0).tolist() == [4, 2, 0, -2, -4]
    assert [annealed(progress) for progress in (0, 0.5, 1)] == pytest.approx([20, 11, 2])


@pytest.mark.parametrize("beta", [2.0, 7.3, 20.0])
def test_the_slope_is_that_of_the_regulariser(beta: float) -> None:
    parts = torch.linspace(0.01, 0.98, 50, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(regulariser(parts, beta).sum(), parts)
    torch.testing.assert_close(slope(parts.detach(), beta), wanted)


def test_two_weights_that_go_together_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: 0.4 and 0.45 both go down to nearest, which costs 1.085; one up costs 0.485 or 0.58, both 1.985."""
    moment, values = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[0.4, 0.45]])
    scale, zero_point, levels = integers()
    assert on_grid(values, scale, zero_point, levels).codes.tolist() == [[0, 0]]
    assert adaround(values, moment, scale, zero_point, levels).codes.tolist() == [[0, 1]]


@pytest.mark.parametrize("grid", [nearest_grid, half_quadratic_grid])
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(grid: Grid) -> None:
    values = weight()
    scale, zero_point = grid(values, 16)
    for moment in (3.0 * torch.eye(64), torch.diag(torch.logspace(-3, 3, 64))):
        made = adaround(values, moment, scale, zero_point)
        assert torch.equal(made.codes, on_grid(values, scale, zero_point).codes)


@pytest.mark.parametrize("grid", [nearest_grid, half_quadratic_grid])
def test_each_weight_goes_up_or_down_and_outputs_change_less(grid: Grid) -> None:
    values, moment = weight(), correlated()
    scale, zero_point = grid(values, 16)
    made, plain = adaround(values, moment, scale, zero_point), on_grid(values, scale, zero_point)
    places = values.reshape(24, 4, 16) / scale[..., None] + zero_point[..., None]
    ways = [made.codes == way.clamp(0, 15).reshape(24, 64) for way in (places.floor(), places.ceil())]
    assert all(way.float().mean() > 0.3 for way in ways)
    assert (ways[0] | ways[1]).all()
    assert (made.codes != plain.codes).float().mean() > 0.05
    errors = [output_error(values, each.dequantized(), moment) for each in (plain, made)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.65 * errors[0].sum()


def test_a_few_large_inputs_do_not_keep_the_others_from_being_decided() -> None:
    """One lambda for all weights, whatever their inputs, leaves 0.42 of the error here."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    inputs[:, :3] *= 30
    inputs += inputs[:, :1] / 10
    values, moment = weight(seed=3), inputs.T @ inputs / 400
    scale, zero_point = nearest_grid(values, 16)
    made, plain = adaround(values, moment, scale, zero_point), on_grid(values, scale, zero_point)
    errors = [output_error(values, each.dequantized(), moment).sum() for each in (plain, made)]
    assert errors[1] < 0.35 * errors[0]


def test_zero_stays_zero_and_weights_beyond_the_grid_stay_at_its_ends() -> None:
    values, moment = weight(), correlated()
    values[:, 32:48] = 0
    scale, zero_point = nearest_grid(values, 16)
    scale = scale / 2
    made = adaround(values, moment, scale, zero_point)
    assert not made.dequantized()[values == 0].any()
    places = values / scale.repeat_interleave(16, 1) + zero_point.repeat_interleave(16, 1)
    assert (places > 15).any()
    assert (places < 0).any()
    assert (made.codes[places > 15] == 15).all()
    assert (made.codes[places < 0] == 0).all()


@pytest.mark.parametrize("columns", [3, 5, 8])
def test_nearly_as_good_as_the_best_of_all_choices(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    values, scale, zero_point, levels = 4 * torch.rand(100, columns, generator=generator), *integers(100)
    inputs = torch.randn(3 * columns, columns, generator=generator) + 1
    moment = inputs.T @ inputs / len(inputs)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=columns)))
    best = torch.stack([output_error(values, values.floor() + choice, moment) for choice in choices]).amin(0)
    learned, plain = (
        output_error(values, made.dequantized(), moment)
        for made in (
            adaround(values, moment, scale, zero_point, levels),
            on_grid(values, scale, zero_point, levels),
        )
    )
    assert (learned >= best * (1 - 1e-5)).all()
    assert (learned <= plain * (1 + 1e-6)).all()
    assert learned.sum() < 1.1 * best.sum()
    assert plain.sum() > 1.5 * best.sum()


def test_no_row_is_worse_than_rounded_to_nearest_however_little_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    values, moment = weight(), correlated()
    scale, zero_point = nearest_grid(values, 16)
    monkeypatch.setattr(module, "RATE", 30.0)  # thrown about
    made, plain = adaround(values, moment, scale, zero_point, iterations=2), on_grid(values, scale, zero_point)
    errors = [output_error(values, each.dequantized(), moment) for each in (plain, made)]
    assert (errors[1] <= errors[0]).all()


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    values, inputs = weight(), torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    inputs[:, 7] = 0
    grid = nearest_grid(values, 16)
    plain = on_grid(values, *grid)
    assert torch.equal(adaround(values, inputs.T @ inputs / 100, *grid).codes[:, 7], plain.codes[:, 7])
    assert torch.equal(adaround(values, torch.zeros(64, 64), *grid).codes, plain.codes)


def test_units_and_the_number_of_rows_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """In powers of 2, which floats multiply exactly."""
    values, moment = weight(), correlated()
    scale, zero_point = nearest_grid(values, 16)
    before = values.clone()
    made = adaround(values, moment, scale, zero_point)
    with torch.inference_mode():
        again = adaround(values, moment, scale, zero_point)
        larger = adaround(values * 2**7, moment * 2.0**-30, scale * 2**7, zero_point)
    assert torch.equal(made.codes, again.codes)
    assert torch.equal(made.codes, larger.codes)
    assert torch.equal(values, before)
    monkeypatch.setattr(module, "AT_ONCE", 7 * 64)
    # Other blocks of a product are summed in another order.
    assert (adaround(values, moment, scale, zero_point).codes == made.codes).float().mean() > 0.98
