"""Floats of 8 bits: E4M3, four bits of exponent, three of mantissa, no infinity (Micikevicius et al. 2022, arXiv 2209.05433).

    values        (-1)^s 2^(e - 7) (1 + m / 8) for e > 0, (-1)^s 2^-6 m / 8 for e = 0; the largest is 448
    quantize      q = nearest(clamp(x / scale, -448, 448))        ties to the even mantissa
    dequantize    x' = q * scale

Every binade has eight steps, so a value is off by a sixteenth of itself at most, whatever its size: outliers cost small values
nothing, and no zero point or smoothing is needed. What is too large becomes 448, as in ONNX QuantizeLinear with `saturate`,
whatever torch's own conversion makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmcompress.ops.rounding import Levels

Nearest = Callable[[Tensor], Tensor]
"""What gives every number's nearest in a format, as a new tensor."""
FLOAT8 = Levels(-448, 448, torch.float8_e4m3fn, symmetric=True)
"""Both ends of the grid; what lies between are no integers."""


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Return the E4M3 numbers of `x` in steps of `scale`, which broadcasts."""
    return torch.div(x.float(), scale.float()).clamp_(FLOAT8.low, FLOAT8.high).to(FLOAT8.dtype)


def nearest_float8(x: Tensor) -> Tensor:
    """Return `x` with every number at the nearest that E4M3 has, in the dtype of `x`."""
    return x.clamp(FLOAT8.low, FLOAT8.high).to(FLOAT8.dtype).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of a clamp, as `ops.rounding` has it for integers."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, nearest: Nearest, largest: float) -> Tensor:  # type: ignore[no-untyped-def]
        steps = torch.where(scale > 0, x / scale, 0.0)
        ctx.save_for_backward(steps.abs() <= largest)
        return nearest(steps).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


def straight_through(x: Tensor, scale: Tensor, nearest: Nearest, largest: float) -> Tensor:
    """Return `x` in steps of `scale` at the `nearest` floats, `largest` at most, in the dtype of `x`; in steps of 0 all are 0."""
    rounded: Tensor = _StraightThrough.apply(x.float(), scale.float(), nearest, largest)
    return rounded.to(x.dtype)


def fake_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Return `x` rounded to E4M3 in steps of `scale`, which broadcasts, in the dtype of `x`; gradients pass straight through."""
    return straight_through(x, scale, nearest_float8, FLOAT8.high)
