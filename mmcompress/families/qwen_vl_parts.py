"""The vision tower of Qwen-VL models for pictures of one fixed grid of patches, any number at once.

transformers lays the patches of all pictures in one row and asks each grid, as numbers, where pictures and windows end: no graph
can hold that for grids it does not know. With one grid they are known beforehand, pictures stay apart, and windows become a mask.

What Qwen3-VL's earlier blocks make for the language model (deepstack) lies behind the image tokens it belongs to, in one row.

Shape alphabet: R pictures, P patches of a picture, N image tokens of a picture, C channels, H heads, D head width, K blocks that
the language model is given something of.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index


@dataclass(frozen=True)
class Layout:
    """Where the patches of a picture lie, as plain numbers."""

    patches: int
    unit: int
    """Patches that one image token is made of."""
    places: tuple[tuple[int, int], ...]
    """Row and column of each patch, in the order the processor gives them."""
    order: tuple[int, ...]
    """The image tokens in the order of their windows; as they come where there are no windows."""
    windows: tuple[int, ...]
    """Where each window begins and the last ends, in patches."""

    @property
    def mean_window(self) -> float:
        """How many patches a patch sees in its window, in the mean over all."""
        return sum((end - start) ** 2 for start, end in pairwise(self.windows)) / self.patches

    @property
    def table_bytes(self) -> int:
        """About how much these take in a graph: a mask, and numbers of 8 bytes for each patch."""
        return self.patches**2 + 8 * 8 * self.patches


def layout(config: Any, grid: tuple[int, int, int]) -> Layout:
    """Return the layout of a picture with `grid` (frames, rows, columns) of patches."""
    # Asked also of models that are being made without values.
    with torch.device("cpu"):
        sizes = torch.tensor([grid])
        unit, patches = config.spatial_merge_size**2, grid[0] * grid[1] * grid[2]
        places = get_vision_position_ids(sizes, config.spatial_merge_size)
        order, windows = torch.arange(patches // unit), torch.tensor([0, patches])
        if getattr(config, "window_size", None):
            order, windows = get_vision_window_index(
                sizes, config.spatial_merge_size, config.window_size, config.patch_size
            )
    return Layout(
        patches,
        unit,
        tuple((row, column) for row, column in places.tolist()),
        tuple(order.tolist()),
        tuple(windows.tolist()),
    )


def look(visual: Any, at: Layout, pixels: Tensor) -> Tensor:
    """Return image tokens (R, N, C), with deepstack (R, N, C + K * C), of pixels (R, P, …), as the vision tower `visual` does."""
    places, order = torch.tensor(at.places), torch.tensor(at.order)
    states = visual.patch_embed(pixels.flatten(0, 1))
    states = states.reshape(-1, at.patches, states.shape[-1])
    if hasattr(visual, "pos_embed"):
        states = states + _positions(visual, at)
    states = _regrouped(states, order, at.unit)
    rotary = tuple(_regrouped(part[None], order, at.unit)[0] for part in visual.rotary_pos_emb(states, places))
    inside = _same_window(at)
    everywhere = getattr(visual, "fullatt_block_indexes", range(len(visual.blocks)))
    deepest: list[int] = list(getattr(visual, "deepstack_visual_indexes", ()))
    deep: list[Tensor] = []
    for index, block in enumerate(visual.blocks):
        mask = None if index in everywhere else inside
        states = states + _attend(block.attn, block.norm1(states), rotary, mask)
        states = states + block.mlp(block.norm2(states))
        if index in deepest:
            deep.append(visual.deepstack_merger_list[deepest.index(index)](states.flatten(0, 1)))
    tokens = torch.cat([visual.merger(states.flatten(0, 1)), *deep], dim=-1)
    back = [0] * len(at.order)
    for place, token in enumerate(at.order):
        back[token] = place
    made: Tensor = tokens.reshape(-1, len(at.order), tokens.shape[-1])[:, torch.tensor(back)]
    return made


def _positions(visual: Any, at: Layout) -> Tensor:
    """Return the learned positions (P, C) of a picture's patches: the square table stretched over its grid."""
    side, high, wide = visual.num_grid_per_side, *(max(line) + 1 for line in zip(*at.places, strict=True))
    table = visual.pos_embed(torch.arange(side**2)).t().reshape(1, -1, side, side)
    stretched = nn.functional.interpolate(
        table, size=(high, wide), mode=visual.interpolation_mode, align_corners=visual.interpolation_align_corners
    )
    made: Tensor = stretched.flatten(2)[0].t()[torch.tensor([row * wide + column for row, column in at.places])]
    return made


def _attend(attention: Any, states: Tensor, rotary: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Return what an attention makes of states (R, P, C); `mask` (P, P) is true where a patch may look."""
    count, heads = states.shape[1], attention.num_heads
    queries, keys, values = (
        attention.qkv(states).reshape(-1, count, 3, heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    )
    queries, keys = (_turned(part, *rotary) for part in (queries, keys))
    seen = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=attention.scaling)
    made: Tensor = attention.proj(seen.transpose(1, 2).reshape(-1, count, heads * attention.head_dim))
    return made


def _turned(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return states (R, H, P, D) turned by their positions (P, D), in float32 as transformers does."""
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cosines.float() + torch.cat([-second, first], dim=-1) * sines.float()).to(states.dtype)


def _regrouped(states: Tensor, order: Tensor, unit: int) -> Tensor:
    """Return states (R, P, C) with groups of `unit` patches in `order`."""
    count, width = states.shape[1:]
    return states.reshape(-1, count // unit, unit, width)[:, order].reshape(-1, count, width)


def _same_window(at: Layout) -> Tensor:
    """Return (P, P), true where two patches lie in one window."""
    ends = torch.tensor(at.windows[1:])
    window = (torch.arange(at.patches)[:, None] >= ends[None, :]).sum(-1)
    return window[:, None] == window[None, :]
