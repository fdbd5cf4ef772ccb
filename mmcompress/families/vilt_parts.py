"""ViLT as one graph, for texts of any length and pictures of any size.

A picture goes in as patches, each with its place. Where a place falls between those of the table of positions is worked out in
integers, so that no precision of the graph can move it.

Shape alphabet: B batch, T text tokens, N patches, P side of a patch, C channels, V answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.families.anatomy import example_pixels, example_tokens
from mmcompress.ops.masks import HIDDEN
from mmcompress.parts import BATCH, TOKENS, Part, Sizes

PATCHES = "patches"
"""The axis of a picture's patches."""


def cut(model: Any, pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return what the graph takes of pixels (B, 3, H, W) and their mask (B, H, W), which is 0 right of and below a picture.

    patches (B, N, 3, P, P); patch_mask (B, N); patch_places (B, N, 4): row and column, and those of the picture's last patch.
    """
    side = model.config.patch_size
    rows, columns = (size // side for size in pixels.shape[2:])
    cropped = pixels[:, :, : rows * side, : columns * side]
    patches = cropped.unflatten(2, (rows, side)).unflatten(4, (columns, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shown = mask[:, ::side, ::side][:, :rows, :columns].bool()
    last = torch.stack([shown[:, :, 0].sum(1), shown[:, 0].sum(1)], dim=1) - 1  # (B, 2)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(1, -1, 2).to(last.device)
    last = last[:, None].expand(-1, rows * columns, -1)
    return {
        "patches": patches.contiguous(),
        "patch_mask": shown.flatten(1).long(),
        "patch_places": torch.cat([torch.minimum(grid, last), last], dim=2),
    }


def image_tokens(model: Any, patches: Tensor, places: Tensor) -> Tensor:
    """Return class token and patches (B, 1 + N, C), the table of positions stretched over each picture's own part."""
    embeddings = model.vilt.embeddings
    count, table = patches.shape[1], embeddings.position_embeddings[0]
    states = embeddings.patch_embeddings.projection(patches.flatten(0, 1)).flatten(1)
    tokens = states.reshape(-1, count, states.shape[-1]) + _stretched(
        table, model.config.image_size // model.config.patch_size, places
    )
    first = (embeddings.cls_token + table[:1]).expand(tokens.shape[0], -1, -1)
    return torch.cat([first, tokens], dim=1)


def _stretched(table: Tensor, side: int, places: Tensor) -> Tensor:
    """Return the positions (B, N, C) of `places` (B, N, 4): bilinear in the table (1 + side * side, C), corners on corners."""
    place, last = places[:, :, :2] * (side - 1), places[:, :, 2:].clamp_min(1)
    before = (place // last).clamp_max(side - 1)
    part = (place - before * last).to(table.dtype) / last.to(table.dtype)
    after = (before + 1).clamp_max(side - 1)
    (above, left), (below, right), (down, across) = (pair.unbind(-1) for pair in (before, after, part))
    corners = torch.stack(
        [above * side + left, above * side + right, below * side + left, below * side + right], dim=-1
    )
    up, back = 1 - down, 1 - across
    weights = torch.stack([up * back, up * across, down * back, down * across], dim=-1)
    return (nn.functional.embedding(1 + corners, table) * weights[..., None]).sum(-2)


def pooled(model: Any, ids: Tensor, mask: Tensor, patches: Tensor, shown: Tensor, places: Tensor) -> Tensor:
    """Return the pooled states (B, C) for ids and mask (B, T) of texts and `patches`, `shown`, `places` as `cut` makes them."""
    vilt, seen = model.vilt, torch.cat([torch.ones_like(shown[:, :1]), shown], dim=1)
    states, whole = vilt.embeddings(ids, mask, None, None, seen, None, image_tokens(model, patches, places))
    zero, hidden = (torch.full((), value, dtype=states.dtype, device=states.device) for value in (0.0, HIDDEN))
    # transformers' own masks ask, while tracing, whether every entry is true; torch's exporter has no word for that (5.23, 2.13).
    looked = torch.where(whole[:, None, None, :].bool(), zero, hidden)
    made: Tensor = vilt.pooler(vilt.layernorm(vilt.encoder(states, attention_mask=looked).last_hidden_state))
    return made


def joint_part(model: Any, head: Callable[[Any, Tensor], Tensor]) -> Part:
    """Return the graph; `head(model, pooled)` makes its logits of the pooled states (B, C)."""
    c = model.config

    def compute(model: Any, *given: Tensor) -> Tensor:
        return head(model, pooled(model, *given))

    def example(sizes: Sizes) -> dict[str, Tensor]:
        batch, columns = sizes[BATCH], sizes[PATCHES]
        ids = example_tokens(batch, sizes[TOKENS], c.vocab_size, 2, c.pad_token_id or 0)
        mask = torch.ones_like(ids)
        if sizes[TOKENS] > 2:
            mask[1::2, -1] = 0  # every second text is shorter
        high, wide = c.patch_size, c.patch_size * columns
        there = torch.ones(batch, high, wide, dtype=torch.long)
        if columns > 2:
            there[1::2, :, -c.patch_size :] = 0  # and its picture smaller
        return {
            "input_ids": ids,
            "attention_mask": mask,
            **cut(model, example_pixels(batch, c.num_channels, high, wide), there),
        }

    return Part(
        "joint",
        compute,
        ("logits",),
        {
            "input_ids": (BATCH, TOKENS),
            "attention_mask": (BATCH, TOKENS),
            "patches": (BATCH, PATCHES),
            "patch_mask": (BATCH, PATCHES),
            "patch_places": (BATCH, PATCHES),
        },
        example,
        traced={TOKENS: 5, PATCHES: 6},
        corners=({TOKENS: 2, PATCHES: 1}, {TOKENS: 7, PATCHES: 4}),
        longest={TOKENS: c.max_position_embeddings, PATCHES: (c.image_size // c.patch_size) ** 2},
        tower="joint",
    )
