"""Activations rounded while they are multiplied: every token, or block of a token's channels, on a grid of its own.

    scale       s = max|x| / largest                  over a token's channels (or a block of them)
    quantize    q = nearest(x / s),  dequantize  x' = q * s

No data is needed beforehand, nothing is ever clipped, and what a token becomes does not depend on its batch (ZeroQuant, Yao et al.
2022, arXiv 2206.01861, section 4.1). Grids are symmetric: the zero point, where a runtime wants unsigned integers, is the same 128
for all tokens, as kernels take only one for a whole tensor.

Since s differs by token only, it leaves the product:  x' W = s * (q W).  A graph thus rounds x / s with a scale of 1, the form in
which runtimes recognise a product of integers, and multiplies by s afterwards.

A cache of keys and values keeps codes and scales, one for each token of each head (`in_steps`), as KIVI (Liu et al. 2024, arXiv
2402.02750) has it for values. Deliberate difference: keys too, which KIVI rounds channel by channel, in groups of tokens
that stay floats until they are full; that is for 2 bits.

Shape alphabet: C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.ops.float8 import FLOAT8, nearest_float8


@dataclass(frozen=True)
class TokenGrid:
    """What x / s is rounded to, -largest..largest, and how a runtime stores it."""

    largest: int
    dtype: torch.dtype
    zero_point: int = 0


TOKEN_UINT8 = TokenGrid(127, torch.uint8, 128)
TOKEN_INT8 = TokenGrid(127, torch.int8)
TOKEN_FLOAT8 = TokenGrid(FLOAT8.high, FLOAT8.dtype)


def token_scale(x: Tensor, grid: TokenGrid) -> Tensor:
    """Return s (…, 1) of `x` (…, C), a positive number even where all of a token is 0."""
    scale = x.abs().amax(-1, keepdim=True) / grid.largest
    # Not clamped: of that TensorRT's parser says that it loses precision, in half precision.
    return torch.maximum(scale, torch.full_like(scale, torch.finfo(x.dtype).tiny))


class _StraightThrough(torch.autograd.Function):
    """Rounding with the gradient 1: nothing is clipped."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: TokenGrid) -> Tensor:  # type: ignore[no-untyped-def]
        scale = token_scale(x, grid)
        steps = torch.div(x, scale)
        return (nearest_float8(steps) if grid.dtype == FLOAT8.dtype else steps.round_()).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient, None


def round_tokens(x: Tensor, grid: TokenGrid) -> Tensor:
    """Return `x` (…, C), each token rounded to its grid but still float; gradients pass straight through.

    Computed in float32, as `ops.rounding` says why.
    """
    rounded: Tensor = _StraightThrough.apply(x.float(), grid)
    return rounded.to(x.dtype)


def in_steps(x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Return x / s (…, C), whose nearest integers are the codes of `x`, and s (…, 1) in the dtype of `x`.

    s is rounded to that dtype first, so that codes times s is exactly what is kept; no code then exceeds the largest. x / s is at
    least float32: half precision does not hold it to the nearest integer. Without gradient.
    """
    scale = token_scale(x.detach(), grid)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(wide) / scale.to(wide), scale


def round_blocks(x: Tensor, size: int, grid: TokenGrid) -> Tensor:
    """Return `x` (…, C), each block of `size` channels of a token rounded to its grid."""
    return round_tokens(x.unflatten(-1, (-1, size)), grid).flatten(-2)
