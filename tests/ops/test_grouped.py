"""4-bit weights in groups: golden values, and what every way of rounding promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmcompress.ops.gptq import compensation, gptq, output_error
from mmcompress.ops.grouped import (
    Grouped,
    group_size_for,
    nearest,
    nearest_grid,
    on_grid,
    pack,
    unpack,
)
from mmcompress.ops.half_quadratic import group_error, half_quadratic, half_quadratic_grid
from mmcompress.ops.rounding import UINT4, Levels


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made[:, ::17] *= 6  # a few large ones, which set the width of a covering grid
    return made


def correlated(columns: int = 64, tokens: int = 400, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(0.1, 2, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return inputs.T @ inputs / tokens


def test_two_bits_by_hand() -> None:
    """Range -1..1.4 in three steps of 0.8; zero lies at place 1."""
    made = nearest(torch.tensor([[-1, -0.2, 0.1, 0.6, 1.4]]), 5, Levels(0, 3, torch.uint8, symmetric=False))
    assert made.scale.item() == pytest.approx(0.8)
    assert made.zero_point.item() == 1
    assert made.codes.tolist() == [[0, 1, 1, 2, 3]]
    torch.testing.assert_close(made.dequantized(), torch.tensor([[-0.8, 0, 0, 0.8, 1.6]]))


def test_each_group_has_the_grid_of_its_own_range() -> None:
    values = weight()
    whole = nearest(values, 16)
    for start in range(0, 64, 16):
        alone = nearest(values[:, start : start + 16], 16)
        assert torch.equal(whole.codes[:, start : start + 16], alone.codes)
        assert torch.equal(whole.scale[:, start // 16], alone.scale[:, 0])
    error = (whole.dequantized() - values).abs().reshape(24, 4, 16)
    # Half a step, and at the ends of the range half a step more: the zero point is rounded too.
    assert (error <= whole.scale[..., None] * 1.001).all()
    assert (error.median(-1).values <= whole.scale * 0.5001).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_zero_stays_zero_where_all_weights_have_one_sign(sign: float) -> None:
    values = sign * weight().abs() + sign
    values[:, 3] = 0
    for made in (nearest(values, 16), half_quadratic(values, 16)):
        assert not made.dequantized()[:, 3].any()


def test_a_group_of_zeros_stays_zero() -> None:
    values = weight()
    values[:, :16] = 0
    moment = torch.eye(64)
    for made in (
        nearest(values, 16),
        half_quadratic(values, 16),
        gptq(values, compensation(moment), *nearest_grid(values, 16)),
    ):
        assert not made.dequantized()[:, :16].any()
        assert made.scale.isfinite().all()
        assert (made.scale > 0).all()


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_packing_keeps_every_code(columns: int) -> None:
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes)
    assert packed.shape == (5, -(-columns // 2))
    assert torch.equal(unpack(packed, columns), codes)


def test_the_earlier_code_lies_in_the_lower_half() -> None:
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x33]]


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [(576, 32, 32), (576, 128, 64), (48, 32, 16), (1536, 128, 128), (24, 32, 0), (20, 16, 0), (48, 0, 48), (24, 0, 0)],
)
def test_group_sizes(columns: int, wanted: int, found: int) -> None:
    assert group_size_for(columns, wanted) == found


def test_half_quadratic_is_never_worse_by_its_own_norm_and_better_where_it_counts() -> None:
    values = weight(64)
    groups = values.reshape(64, 4, 16)
    errors = {
        name: group_error(groups, made.dequantized().reshape(64, 4, 16))
        for name, made in (("nearest", nearest(values, 16)), ("hqq", half_quadratic(values, 16)))
    }
    assert (errors["hqq"] <= errors["nearest"] * (1 + 1e-5)).all()
    assert errors["hqq"].sum() < 0.96 * errors["nearest"].sum()


@pytest.mark.parametrize("by", [1e-3, 8.0])
def test_half_quadratic_does_not_depend_on_the_unit_of_the_weights(by: float) -> None:
    values = weight()
    one, other = half_quadratic(values, 16), half_quadratic(values * by, 16)
    assert (one.codes != other.codes).float().mean() < 0.01
    torch.testing.assert_close(one.scale * by, other.scale, rtol=1e-2, atol=0)


def test_half_quadratic_leaves_what_lies_on_a_grid() -> None:
    once = nearest(weight(), 16).dequantized()
    torch.testing.assert_close(half_quadratic(once, 16).dequantized(), once, rtol=1e-4, atol=1e-5)


def integers(low: int = -8, high: int = 7) -> tuple[Tensor, Tensor, Levels]:
    """The grid of whole numbers."""
    return torch.ones(1, 1), torch.zeros(1, 1), Levels(low, high, torch.int8, symmetric=True)


def test_gptq_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: 0.4 goes to 0, which moves 0.45 by 0.4 * 1/2 to 0.65, and that goes to 1."""
    moment, values = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[0.4, 0.45]])
    scale, zero_point, levels = integers()
    plain = on_grid(values, scale, zero_point, levels)
    made = gptq(values, compensation(moment, damping=0.0), scale, zero_point, levels)
    assert plain.codes.tolist() == [[0, 0]]
    assert made.codes.tolist() == [[0, 1]]
    assert output_error(values, plain.codes, moment).item() == pytest.approx(1.085)
    assert output_error(values, made.codes, moment).item() == pytest.approx(0.485)


def test_the_largest_inputs_are_rounded_first() -> None:
    """Now the second column goes first: 0.45 to 0, which moves 0.4 by 0.45 * 1/2 to 0.625, and that goes to 1."""
    moment, values = torch.tensor([[2.0, 1.0], [1.0, 2.1]]), torch.tensor([[0.4, 0.45]])
    assert gptq(values, compensation(moment, damping=0.0), *integers()).codes.tolist() == [[1, 0]]


@pytest.mark.parametrize("columns", [64, 192])
def test_gptq_with_inputs_that_have_nothing_to_do_with_each_other_rounds_to_nearest(columns: int) -> None:
    values = weight(columns=columns)
    made = gptq(values, compensation(3.0 * torch.eye(columns)), *nearest_grid(values, 16))
    assert torch.equal(made.codes, nearest(values, 16).codes)


@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("grid", [nearest_grid, half_quadratic_grid])
def test_gptq_lowers_the_error_of_the_output(columns: int, grid: object) -> None:
    values, moment = weight(columns=columns), correlated(columns)
    assert callable(grid)
    scale, zero_point = grid(values, 16)
    errors = [
        output_error(values, made.dequantized(), moment).sum().item()
        for made in (on_grid(values, scale, zero_point), gptq(values, compensation(moment), scale, zero_point))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_gptq_takes_inputs_that_were_never_seen_and_moments_of_few_samples() -> None:
    values, inputs = weight(), torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    inputs[:, 7] = 0
    made = gptq(values, compensation(inputs.T @ inputs / 5), *nearest_grid(values, 16))
    assert torch.equal(made.codes[:, 7], nearest(values, 16).codes[:, 7])
    silent = gptq(values, compensation(torch.zeros(64, 64)), *nearest_grid(values, 16))
    assert torch.equal(silent.codes, nearest(values, 16).codes)


def test_the_weight_itself_is_left_alone() -> None:
    values = weight()
    before = values.clone()
    for made in (
        nearest(values, 16),
        half_quadratic(values, 16),
        gptq(values, compensation(correlated()), *nearest_grid(values, 16)),
    ):
        assert isinstance(made, Grouped)
        assert made.codes.dtype == UINT4.dtype
        assert int(made.codes.max()) <= 15
    assert torch.equal(values, before)
