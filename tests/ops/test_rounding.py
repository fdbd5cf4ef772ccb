"""Rounding: golden values worked out by hand, and what must hold for any numbers."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops.rounding import (
    INT8,
    UINT8,
    WEIGHT_INT7,
    WEIGHT_INT8,
    Levels,
    choose_scale,
    dequantize,
    fake_quantize,
    quantize,
    scale_from_range,
    smoothing,
)

TWO_BITS = Levels(0, 3, torch.uint8, symmetric=False)
EVERY = pytest.mark.parametrize("levels", [UINT8, INT8, WEIGHT_INT8, WEIGHT_INT7])


def test_two_bits_by_hand() -> None:
    # Range -1..1.4 in 3 steps of 0.8; zero at round(1 / 0.8) = 1.
    x = torch.tensor([-1.0, -0.2, 0.1, 0.6, 1.4])
    scale, zero_point = choose_scale(x, TWO_BITS)
    assert scale.item() == pytest.approx(0.8)
    assert zero_point.item() == 1
    q = quantize(x, scale, zero_point, TWO_BITS)
    assert q.tolist() == [0, 1, 1, 2, 3]
    assert dequantize(q, scale, zero_point).tolist() == pytest.approx([-0.8, 0, 0, 0.8, 1.6])


def test_symmetric_by_hand() -> None:
    scale, zero_point = choose_scale(torch.tensor([-2.54, 1.0]), WEIGHT_INT8)
    assert scale.item() == pytest.approx(0.02)
    assert zero_point.item() == 0
    x = torch.tensor([0.01, 0.03, 0.05, 9.0, -9.0])
    # 0.5, 1.5 and 2.5 steps: half to even, as ONNX rounds; then clamped.
    assert quantize(x, torch.tensor(0.02), zero_point, WEIGHT_INT8).tolist() == [0, 2, 2, 127, -127]


def test_smoothing_by_hand() -> None:
    s = smoothing(torch.tensor([8.0, 1.0]), torch.tensor([0.5, 2.0]), 0.5)
    assert s.tolist() == pytest.approx([4.0, 0.70710678])
    # 16^0.75 / 16^0.25 = 8 / 2.
    assert smoothing(torch.tensor([16.0]), torch.tensor([16.0]), 0.75).item() == pytest.approx(4.0)
    assert (torch.tensor([8.0, 1.0]) / s).tolist() == pytest.approx([2.0, 1.41421356])
    assert (torch.tensor([0.5, 2.0]) * s).tolist() == pytest.approx([2.0, 1.41421356])


def test_smoothing_keeps_silent_channels_bounded() -> None:
    s = smoothing(torch.tensor([8.0, 0.0]), torch.tensor([1.0, 1.0]), 1.0)
    assert s[0] / s[1] == pytest.approx(1e4)
    assert torch.isfinite(smoothing(torch.zeros(3), torch.zeros(3), 0.5)).all()


@EVERY
def test_the_error_is_at_most_half_a_step(levels: Levels) -> None:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    scale, zero_point = choose_scale(x, levels, axis=0)
    error = (dequantize(quantize(x, scale, zero_point, levels, axis=0), scale, zero_point, axis=0) - x).abs()
    # An asymmetric range is shifted by up to half a step so that zero is on the grid.
    steps = 0.5 if levels.symmetric else 1.0
    assert (error <= scale[:, None] * steps * 1.001).all()


@EVERY
def test_zero_and_grid_points_are_exact(levels: Levels) -> None:
    scale, zero_point = scale_from_range(torch.tensor(-1.7), torch.tensor(3.1), levels)
    grid = dequantize(torch.arange(levels.low, levels.high + 1, dtype=torch.int16), scale, zero_point)
    assert torch.equal(fake_quantize(grid, scale, zero_point, levels), grid)
    assert 0.0 in grid.tolist()


@EVERY
def test_fake_quantization_is_quantize_then_dequantize(levels: Levels) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 3
    scale, zero_point = scale_from_range(torch.tensor(-2.0), torch.tensor(5.0), levels)
    want = dequantize(quantize(x, scale, zero_point, levels), scale, zero_point)
    assert torch.equal(fake_quantize(x, scale, zero_point, levels), want)


def test_gradients_pass_inside_the_grid_only() -> None:
    x = torch.tensor([-9.0, -0.4, 0.3, 9.0], requires_grad=True)
    scale, zero_point = scale_from_range(torch.tensor(-1.0), torch.tensor(1.0), INT8)
    rounded = fake_quantize(x, scale, zero_point, INT8)
    rounded.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert torch.equal(rounded.detach(), fake_quantize(x.detach(), scale, zero_point, INT8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_to_the_same_grid(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 400).to(dtype)
    scale, zero_point = scale_from_range(torch.tensor(-1.0), torch.tensor(1.0), UINT8)
    rounded = fake_quantize(x, scale, zero_point, UINT8)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, fake_quantize(x.float(), scale, zero_point, UINT8).to(dtype))


def test_a_constant_zero_tensor_has_a_usable_scale() -> None:
    for levels in (UINT8, WEIGHT_INT8):
        scale, zero_point = choose_scale(torch.zeros(4), levels)
        assert dequantize(quantize(torch.zeros(4), scale, zero_point, levels), scale, zero_point).tolist() == [0] * 4
