"""Position tables for images of any shape, as tensor arithmetic over a whole batch.

The same values as bilinear interpolation with antialiasing of the table to each image's shape (the triangle filter of PIL and of
torch's `interpolate`), without a loop over images and without sizes read from tensors, so that it can be exported and
batched. A position's weights over a table of side G, for an axis of n positions and p = 0..n-1, with s = G / n:

    weight(p, g) = max(0, 1 - |g + 0.5 - s (p + 0.5)| / max(s, 1)),   normalised over g

Shape alphabet: B batch, N tokens, C channels, G side of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize_grid(table: Tensor, shapes: Tensor, length: int) -> Tensor:
    """Resize `table` (G, G, C) to each row (height, width) of `shapes` (B, 2), flattened and padded to (B, `length`, C).

    Padding repeats the first position.
    """
    heights, widths = shapes[:, :1], shapes[:, 1:]
    index = torch.arange(length, device=shapes.device)[None]
    index = torch.where(index < heights * widths, index, 0)  # (B, N)
    rows = _weights(torch.div(index, widths, rounding_mode="floor"), heights, table.shape[0])
    columns = _weights(torch.remainder(index, widths), widths, table.shape[1])
    # (B, N, G, 1) * (B, N, 1, G) -> (B, N, G * G)
    weights = (rows[..., None] * columns[..., None, :]).flatten(2)
    return (weights @ table.float().flatten(0, 1)).to(table.dtype)


def _weights(positions: Tensor, count: Tensor, side: int) -> Tensor:
    """Return the filter's weights (B, N, `side`) of `positions` (B, N) on an axis of `count` (B, 1) positions."""
    stretch = (side / count)[..., None]
    centers = stretch * (positions[..., None] + 0.5)
    cells = torch.arange(side, device=positions.device) + 0.5
    weights = (1 - (cells - centers).abs() / stretch.clamp_min(1)).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)
