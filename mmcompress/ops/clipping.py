"""Clipped grids for weights: a group's few largest weights are cut off where that changes the outputs less.

A grid that covers a group is as wide as its largest weight. Cutting the range to a share of it makes all steps finer, and moves the
weights beyond the ends (the second half of AWQ: Lin et al. 2023, arXiv 2306.00978; `auto_clip` in its code). What counts is the
error of the output over the samples, (w - w') H (w - w')' for the second moment H = E[x x'] of the inputs.

Deliberate differences: the paper looks at each group's own part of the output. Here groups are taken one after the other, and what
the others already do to the output counts: with d = w - w' and a change e of d inside group g,

    error(d + e) - error(d) = 2 e (H d)_g + e H_gg e'

is exact, so no step ever raises the error of the whole row. Shares go to 0.5 in steps of 0.05, the paper's code in half of them.

Shape alphabet: R rows (outputs), C columns (inputs), G groups of S columns each, K shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.grouped import on_grid
from mmcompress.ops.rounding import UINT4, Levels, scale_from_range

SHARES = tuple(1 - step / 20 for step in range(1, 11))


def clipped_grid(
    weight: Tensor, moment: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels = UINT4
) -> tuple[Tensor, Tensor]:
    """Return grids (R, G) for `weight` (R, C), rounded to nearest: the given ones, narrower where that lowers the output error."""
    values, moment = weight.detach().float(), moment.float()
    scale, zero_point = scale.float().clone(), zero_point.clone()
    size = values.shape[1] // scale.shape[1]
    left = values - on_grid(values, scale, zero_point, levels).dequantized()
    pull = left @ moment
    for group in range(scale.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        steps, zeros = _narrower(values[:, columns], levels)
        made = _rounded(values[:, columns], steps, zeros, levels)
        changes = (values[:, columns] - made) - left[:, columns]  # (K, R, S)
        gains = 2 * (changes * pull[:, columns]).sum(-1)
        gains += ((changes @ moment[columns, columns]) * changes).sum(-1)
        best, chosen = gains.min(0)
        rows = torch.arange(len(values), device=values.device)
        better = best < 0
        scale[:, group] = torch.where(better, steps[chosen, rows], scale[:, group])
        zero_point[:, group] = torch.where(better, zeros[chosen, rows], zero_point[:, group])
        change = changes[chosen, rows] * better[:, None]
        left[:, columns] += change
        pull.addmm_(change, moment[columns])
    return scale, zero_point


def _narrower(weight: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points (K, R) of grids that cover a share of each row of a group (R, S)."""
    shares = torch.tensor(SHARES, device=weight.device)[:, None]
    return scale_from_range(weight.amin(1).clamp_max(0) * shares, weight.amax(1).clamp_min(0) * shares, levels)


def _rounded(weight: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels) -> Tensor:
    """Return a group (R, S) as floats on each of K grids: (K, R, S)."""
    zeros = zero_point.float()[..., None]
    codes = (weight / scale[..., None]).round_().add_(zeros).clamp_(levels.low, levels.high)
    return codes.sub_(zeros).mul_(scale[..., None])
