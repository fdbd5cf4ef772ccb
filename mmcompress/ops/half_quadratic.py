"""HQQ, half-quadratic quantization: grids that lie well for most weights of a group, found without data.

The largest weight of a group alone decides how wide a covering grid is. HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of
Large Machine Learning Models") looks for the grid with the least  sum |w - w'|^p,  p < 1: a norm that forgives the few weights that
end up far off. The problem is split by an auxiliary error e, which takes up what is not to be fitted:

    e   <- shrink(w - w')       shrink(x) = sign(x) * max(0, |x| - p * |x|^(p - 1) / beta)
    w'  <- the grid that fits  w - e  best, codes held; then every w at its nearest place
    beta <- 1.01 * beta

Deliberate differences:

* Weights are measured in steps of the covering grid, since beta knows no units: with weights as they come (errors of a few
  thousandths, beta 10) everything is shrunk to 0 and nothing forgiven. Weights end up nearer than rounded to nearest;
  SmolLM2's perplexity is the same as then (python -m bench.four_bits).
* Zero points stay integers, since that is what runtimes multiply with. The scale is fitted instead, by least squares, then the mean
  zero point.
* Every group keeps the best grid it has met, the covering one included, so that none is worse than rounded to nearest by the norm.

Shape alphabet: R rows, C columns, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.grouped import Grouped, nearest_grid, on_grid
from mmcompress.ops.rounding import UINT4, Levels

NORM = 0.7
BETA, GROWTH = 5.0, 1.01
ROUNDS = 10
"""More fit the norm, not the squared error of the Linears above, any better."""


def half_quadratic(weight: Tensor, size: int, levels: Levels = UINT4) -> Grouped:
    """Round `weight` (R, C) in groups of `size` columns to the grids with the least error by the norm."""
    scale, zero_point = half_quadratic_grid(weight, size, levels)
    return on_grid(weight, scale, zero_point, levels)


def half_quadratic_grid(weight: Tensor, size: int, levels: Levels = UINT4) -> tuple[Tensor, Tensor]:
    """Return (scale (R, G) float32, zero_point (R, G)) of the best grids met."""
    scale, zero_point = nearest_grid(weight, size, levels)
    groups = weight.detach().float().reshape(*scale.shape, size)
    unit = scale
    groups = groups / unit[..., None]
    scale = torch.ones_like(unit)
    best_scale, best_zero = scale, zero_point.float()
    zero = best_zero
    codes = _codes(groups, scale, zero, levels)
    least = group_error(groups, (codes - zero[..., None]) * scale[..., None])
    beta = BETA
    for _ in range(ROUNDS):
        fitted = groups - _shrunk(groups - (codes - zero[..., None]) * scale[..., None], beta)
        scale, zero = _fit(fitted, codes, scale, zero, levels)
        codes = _codes(groups, scale, zero, levels)
        error = group_error(groups, (codes - zero[..., None]) * scale[..., None])
        better = error < least
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        least = torch.where(better, error, least)
        beta *= GROWTH
    return best_scale * unit, best_zero.to(levels.dtype)


def group_error(groups: Tensor, rounded: Tensor) -> Tensor:
    """Return sum |w - w'|^p over the last dimension."""
    return (groups - rounded).abs().pow(NORM).sum(-1)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    steps = torch.div(groups, scale[..., None]).round_()
    return steps.add_(zero[..., None]).clamp_(levels.low, levels.high)


def _shrunk(error: Tensor, beta: float) -> Tensor:
    """Return what of an error is not to be fitted: the large ones nearly whole, the small ones not at all."""
    size = error.abs().clamp_min(torch.finfo(error.dtype).tiny)
    return error.sign() * (size - NORM * size.pow(NORM - 1) / beta).clamp_min_(0)


def _fit(fitted: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point (R, G) that bring `codes` nearest to `fitted` (R, G, S), one after the other."""
    steps = codes - zero[..., None]
    squares = steps.square().sum(-1)
    best = (steps * fitted).sum(-1) / squares.clamp_min(1)
    # A group of zeros fits any scale, and a scale must be positive.
    scale = torch.where(best > 0, best, scale)
    zero = (codes - fitted / scale[..., None]).mean(-1).round_().clamp_(levels.low, levels.high)
    return scale, zero
