"""Weights of 4 bits, rounded in groups of neighbouring columns that share a scale and a zero point, two codes to a byte.

    quantize      q = clamp(round(w / scale) + zero_point, 0, 15)
    dequantize    w' = (q - zero_point) * scale

Fifteen steps are too few for a whole row: a group of 32 or so has a grid of its own (Yao et al. 2022, arXiv 2206.01861, section
3.1). The grid is asymmetric and contains 0, so that a pruned weight stays 0. Zero points are integers, which is what runtimes
multiply with.

Bytes hold the earlier of two codes in their lower half, as ONNX Runtime's MatMulNBits reads them; of an odd number of zero points
the last fills its byte twice.

Shape alphabet: R rows (outputs), C columns (inputs), G groups of S columns each, C = G * S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.ops.rounding import UINT4, Levels, scale_from_range

MIDDLE = 8
"""The zero point of symmetric grids of 4 bits."""

GROUP_SIZES = (128, 64, 32, 16)
"""What runtimes take: powers of two from 16 on."""


@dataclass(frozen=True)
class Grouped:
    """A matrix (R, C) as codes (R, C) uint8, scale (R, G) and zero_point (R, G) uint8."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def where(self, rows: Tensor, other: Grouped) -> Grouped:
        """Return these rows where `rows` (R,), else those of `other`."""
        mine = rows[:, None]
        return Grouped(
            torch.where(mine, self.codes, other.codes),
            torch.where(mine, self.scale, other.scale),
            torch.where(mine, self.zero_point, other.zero_point),
        )

    def dequantized(self) -> Tensor:
        """Return the floats (R, C) the codes stand for, in the scale's dtype."""
        rows, groups = self.scale.shape
        steps = self.codes.reshape(rows, groups, -1).to(self.scale.dtype) - self.zero_point[..., None]
        return (steps * self.scale[..., None]).reshape(self.codes.shape)


def group_size_for(columns: int, wanted: int) -> int:
    """Return the size of groups that `columns` are cut into: `wanted`, or the largest that divides them; 0 where none does.

    `wanted` 0 makes one group of a whole row, where it could be cut into groups: runtimes know no other layout.
    """
    fitting = next((size for size in GROUP_SIZES if columns % size == 0), 0)
    if wanted == 0:
        return columns if fitting else 0
    return wanted if columns % wanted == 0 else fitting


def block_size_for(columns: int, size: int) -> int:
    """Return the size of a runtime's blocks for groups of `size` columns: that, or what cuts a whole row evenly."""
    return size if size in GROUP_SIZES else group_size_for(columns, GROUP_SIZES[0])


def nearest_grid(weight: Tensor, size: int, levels: Levels = UINT4) -> tuple[Tensor, Tensor]:
    """Return (scale (R, G) float32, zero_point (R, G)) that cover every weight (R, C) of each group."""
    groups = weight.detach().float().reshape(len(weight), -1, size)
    return scale_from_range(groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0), levels)


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels = UINT4) -> Grouped:
    """Return `weight` (R, C), each number at the nearest place of its group's grid."""
    rows, groups = scale.shape
    steps = torch.div(weight.detach().float().reshape(rows, groups, -1), scale.float()[..., None])
    codes = steps.round_().add_(zero_point[..., None]).clamp_(levels.low, levels.high)
    return Grouped(codes.to(levels.dtype).reshape(weight.shape), scale, zero_point)


def nearest(weight: Tensor, size: int, levels: Levels = UINT4) -> Grouped:
    """Round `weight` (R, C) to the nearest place of grids that cover it: what every other method is measured against."""
    return on_grid(weight, *nearest_grid(weight, size, levels), levels)


def nearest_symmetric(weight: Tensor, size: int) -> Grouped:
    """Round `weight` (R, C) to the nearest place of grids of 4 bits whose zero point is the middle, 8: steps of -7..7."""
    groups = weight.detach().float().reshape(len(weight), -1, size)
    largest = groups.abs().amax(-1)
    scale = largest / (UINT4.high - MIDDLE)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return on_grid(weight, scale, torch.full_like(scale, MIDDLE, dtype=UINT4.dtype))


def pack(codes: Tensor) -> Tensor:
    """Return codes (R, C) two to a byte: (R, ceil(C / 2)) uint8."""
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes[:, -1:]], dim=1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Return the codes (R, columns) uint8 of `packed` (R, ceil(columns / 2))."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :columns]
