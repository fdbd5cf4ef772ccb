"""Numbers on a grid: how a float becomes an integer and back.

    quantize      q = clamp(round(x / scale) + zero_point, low, high)        round half to even
    dequantize    x' = (q - zero_point) * scale

This is the arithmetic of ONNX QuantizeLinear and DequantizeLinear (opset 13 and later); formulas as in Jacob et al. 2018
(arXiv 1712.05877), section 2.1. A symmetric grid has zero point 0 and the scale max|x| / high; an asymmetric one spends every
level on min(x)..max(x). Weights are kept to -127..127 so that a weight and its negative are rounded alike.

Shapes: a scale is a scalar for a whole tensor or (C,) for one per channel; `axis` says which dimension C is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The integers of a grid, both ends included. Symmetric grids have their zero point at 0."""

    low: int
    high: int
    dtype: torch.dtype
    symmetric: bool


UINT8 = Levels(0, 255, torch.uint8, symmetric=False)
INT8 = Levels(-128, 127, torch.int8, symmetric=True)
UINT4 = Levels(0, 15, torch.uint8, symmetric=False)
"""Stored two to a byte: see `ops.grouped`."""
WEIGHT_INT8 = Levels(-127, 127, torch.int8, symmetric=True)
WEIGHT_INT7 = Levels(-63, 63, torch.int8, symmetric=True)
"""Half the range: the sum of two u8*s8 products then fits the 16 bits that x86 CPUs without VNNI or AMX accumulate in."""


def scale_from_range(lowest: Tensor, highest: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point) that cover lowest..highest, which include 0; elementwise, so channels may be given at once.

    The zero point has the grid's dtype. A range of width 0 gets scale 1: everything in it is then a multiple of the scale
    or far below half of it.
    """
    lowest, highest = lowest.float(), highest.float()
    if levels.symmetric:
        scale = torch.maximum(lowest.abs(), highest.abs()) / levels.high
        zero_point = torch.zeros_like(scale)
    else:
        scale = (highest - lowest) / (levels.high - levels.low)
    # Below the smallest normal float32, x / scale overflows.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    if not levels.symmetric:
        zero_point = (levels.low - lowest / scale).round().clamp(levels.low, levels.high)
    return scale, zero_point.to(levels.dtype)


def along(values: Tensor, axis: int | None, dimensions: int) -> Tensor:
    """Shape per-channel values (C,) so that they broadcast along `axis` of a tensor with `dimensions` dimensions."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels, axis: int | None = None) -> Tensor:
    """Return the integers of `x` in the grid's dtype."""
    scale, zero_point = along(scale, axis, x.ndim), along(zero_point, axis, x.ndim)
    return torch.div(x, scale).round_().add_(zero_point).clamp_(levels.low, levels.high).to(levels.dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """Return the floats that the integers `q` stand for, in the dtype of `scale`."""
    x = q.to(scale.dtype)
    if zero_point is not None:
        x = x - along(zero_point, axis, q.ndim)
    return x * along(scale, axis, q.ndim)


class _StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of a clamp: 1 inside the grid, 0 outside (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:  # type: ignore[no-untyped-def]
        q = torch.div(x, scale).round_().add_(zero_point)
        ctx.save_for_backward((q >= low) & (q <= high))
        return q.clamp_(low, high).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels) -> Tensor:
    """Return `x` rounded to the grid but still float, in the dtype of `x`; gradients pass straight through.

    The rounding itself is done in float32: half precision cannot hold x / scale to the nearest integer up to 255.
    """
    if x.requires_grad and torch.is_grad_enabled():
        rounded = _StraightThrough.apply(x.float(), scale.float(), zero_point.float(), levels.low, levels.high)
    else:
        scale, zero_point = scale.float(), zero_point.float()
        q = torch.div(x.float(), scale).round_().add_(zero_point).clamp_(levels.low, levels.high)
        rounded = q.sub_(zero_point).mul_(scale)
    return rounded.to(x.dtype)


def choose_scale(x: Tensor, levels: Levels, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point) that cover every value of `x`: scalars, or (C,) with `axis`.

    For values that are there as a whole, such as weights. Streams of activations: see `ops.observers`.
    """
    rows = x.detach().float().reshape(1, -1) if axis is None else x.detach().float().movedim(axis, 0).flatten(1)
    scale, zero_point = scale_from_range(rows.amin(1), rows.amax(1), levels)
    return (scale[0], zero_point[0]) if axis is None else (scale, zero_point)


def smoothing(input_max: Tensor, weight_max: Tensor, strength: float) -> Tensor:
    """Return s (C,): inputs divided by s and weights multiplied by it share their outliers (SmoothQuant, arXiv 2211.10438, eq. 4).

    s = max|x|^strength / max|w|^(1 - strength) per input channel, given max|x| and max|w|, both (C,). Channels more than four
    orders of magnitude below the largest count as that: a channel silent in calibration must not be blown up later.
    """
    inputs, weights = (
        part.float().clamp_min(float(part.max()) * 1e-4).clamp_min(torch.finfo(torch.float32).tiny)
        for part in (input_max, weight_max)
    )
    return inputs**strength / weights ** (1 - strength)
