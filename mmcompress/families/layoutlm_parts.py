"""LayoutLMv3 as one graph, for pages of any number of words.

How far two tokens lie apart decides a bias of their attention: by a logarithm that is cut to an integer. Engines round a logarithm
differently, so the graph holds a table of what the model makes of every distance.

Shape alphabet: B batch, T text tokens, N patches with their class token, S = T + N, H heads, C channels, V labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.ops.masks import HIDDEN
from mmcompress.parts import BATCH, TOKENS, Part, Sizes


@dataclass(frozen=True)
class Distances:
    """The model's bucket of every distance from -limit to limit, as plain numbers: of tokens in their order, and of places."""

    order: tuple[int, ...]
    places: tuple[int, ...]


def distances(base: Any) -> Distances:
    """Return the buckets, as the model's own code computes them."""
    c, bucket = base.config, base.encoder.relative_position_bucket
    longest = max(c.max_position_embeddings, base.pos_embed.shape[1])

    def table(limit: int, buckets: int, largest: int) -> tuple[int, ...]:
        found: list[int] = bucket(torch.arange(-limit, limit + 1), num_buckets=buckets, max_distance=largest).tolist()
        return tuple(found)

    return Distances(
        table(longest, c.rel_pos_bins, c.max_rel_pos),
        table(c.max_2d_position_embeddings, c.rel_2d_pos_bins, c.max_rel_2d_pos),
    )


def states(base: Any, known: Distances, ids: Tensor, boxes: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
    """Return the last states (B, S, C) for ids and mask (B, T), boxes (B, T, 4) and pixels (B, 3, H, W), as `base` makes them."""
    batch, count = ids.shape
    read = base.embeddings(input_ids=ids, bbox=boxes, token_type_ids=torch.zeros_like(ids))
    seen = base.forward_image(pixels)
    hidden = base.dropout(base.LayerNorm(torch.cat([read, seen], dim=1)))
    whole = torch.cat([mask, torch.ones_like(seen[:, :, 0], dtype=mask.dtype)], dim=1)
    zero, hide = (torch.full((), value, dtype=hidden.dtype, device=ids.device) for value in (0.0, HIDDEN))
    looked = torch.where(whole[:, None, None, :].bool(), zero, hide)
    encoder, order, places = base.encoder, None, None
    if encoder.has_relative_attention_bias:
        numbers = torch.cat([torch.arange(size, device=ids.device) for size in (count, seen.shape[1])])[None]
        order = _bias(numbers, encoder.rel_pos_bias, known.order)
    if encoder.has_spatial_attention_bias:
        everywhere = torch.cat([boxes, base.visual_bbox[None].expand(batch, -1, -1)], dim=1)
        across = _bias(everywhere[:, :, 0], encoder.rel_pos_x_bias, known.places)
        places = across + _bias(everywhere[:, :, 3], encoder.rel_pos_y_bias, known.places)
    biases = _as_blocks_take(encoder.layer[0], order, places, base.config)
    for block in encoder.layer:
        hidden = block(hidden, looked, **biases)
    return hidden


def _as_blocks_take(
    block: nn.Module, order: Tensor | None, places: Tensor | None, config: Any
) -> dict[str, Tensor | None]:
    """Return the biases by keyword: two that the block divides, or (transformers from 5.24 on) their sum, divided."""
    if "position_bias" not in signature(block.forward).parameters:
        return {"rel_pos": order, "rel_2d_pos": places}
    if order is None:
        return {"position_bias": None}
    both = order if places is None else order + places
    return {"position_bias": both / math.sqrt(config.hidden_size // config.num_attention_heads)}


def _bias(numbers: Tensor, linear: nn.Linear, buckets: tuple[int, ...]) -> Tensor:
    """Return the bias (B, H, S, S) by how far `numbers` (B, S) lie apart."""
    table = nn.functional.embedding(torch.tensor(buckets, device=numbers.device), linear.weight.t())
    apart = numbers[:, None, :] - numbers[:, :, None]
    return nn.functional.embedding(apart + len(buckets) // 2, table).permute(0, 3, 1, 2)


def joint_part(
    model: Any,
    output: str,
    compute: Callable[..., Tensor],
    example: Callable[[int, int], dict[str, Tensor]],
    known: Distances,
    longest: int,
) -> Part:
    """Return the graph of `compute(model, ids, boxes, mask, pixels)`, called `output`.

    `example(batch, tokens)` makes inputs; `longest`: the most tokens of a page.
    """

    def sized(sizes: Sizes) -> dict[str, Tensor]:
        made = example(sizes[BATCH], sizes[TOKENS])
        if sizes[TOKENS] > 2:
            made["attention_mask"][1::2, -1] = 0  # every second page has a word less
            made["input_ids"][1::2, -1] = model.config.pad_token_id
        return made

    return Part(
        "joint",
        compute,
        (output,),
        {
            "input_ids": (BATCH, TOKENS),
            "bbox": (BATCH, TOKENS),
            "attention_mask": (BATCH, TOKENS),
            "pixel_values": (BATCH,),
        },
        sized,
        traced={TOKENS: 5},
        corners=({TOKENS: 2}, {TOKENS: 9}),
        longest={TOKENS: longest},
        most_tokens=longest,
        # A bias for each head, and the bucket it came from.
        tables=(len(known.order) + 2 * len(known.places)) * (4 * model.config.num_attention_heads + 8),
        tower="joint",
    )
