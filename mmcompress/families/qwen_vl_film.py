"""What a Qwen-VL language model is given of a video, and the graph that makes its layers fewer.

The exported vision part sees each layer of a video as a picture of its own. Which of them become one is not seen from them: tables
say it, made with the prompt, and a part between looking and writing multiplies with them.

Shape alphabet: R layers of all pictures and videos, M layers left, N image tokens of a layer, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmcompress.parts import BATCH, Part, Sizes
from mmcompress.surgery.frames import merging_of, multiplied, tables_for
from mmcompress.views import Film

TABLE, LAYERS = "frame_table", "layers"
LOOKED = "layer_embeds"


def film(kind: str, channels: int, levels: int, stride: int) -> Film:
    """Return the view of what models of the config's model_type `kind` are given of a video."""
    made = Film(path="model", makers=(), channels=channels, levels=levels, stride=stride)
    if kind == "qwen3_vl":
        # Its maker of videos calls that of images. Each layer has a run of image tokens of its own, behind its time in words.
        return replace(
            made, makers=("get_image_features",), deeper="deepstack_features", numbering="get_rope_index",
            grids="video_grid_thw",
        )  # fmt: skip
    return replace(made, makers=("get_image_features", "get_video_features"), placing="get_vision_position_ids")


def frame_tables(model: Any, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the tables (3, M, R) of each stage for pictures and videos of so many `layers`; none where all go on."""
    how = merging_of(model.model)
    return {f"{TABLE}_{stage}": table for stage, table in enumerate(tables_for(how, layers), 1)} if how else {}


def with_fewer_frames(model: Any, looking: Part, tokens: int, width: int) -> tuple[Part, ...]:
    """Return the part that looks, and where layers become fewer another that makes image_embeds (M, N, C) of its (R, N, C)."""
    tables = frame_tables(model, [1])
    if not tables:
        return (looking,)
    sides = [BATCH, *(f"{LAYERS}_{stage}" for stage in range(1, 1 + len(tables)))]

    def merge(model: Any, rows: Tensor, *tables: Tensor) -> Tensor:
        return multiplied(model.model, rows, tables)

    def example(sizes: Sizes) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        made = {LOOKED: torch.randn(sizes[BATCH], tokens, width, generator=generator)}
        for name, before, after in zip(tables, sides, sides[1:], strict=False):
            places = torch.arange(sizes[after])[:, None] * 2 + torch.arange(-1, 2)
            hot = places.clamp(0, sizes[before] - 1).t()[..., None] == torch.arange(sizes[before])
            made[name] = hot.float()
        return made

    def sized(most: int) -> Sizes:
        return {side: max(1, most - stage) for stage, side in enumerate(sides[1:])}

    part = Part(
        "frames",
        merge,
        ("image_embeds",),
        {LOOKED: (BATCH,)}
        | {name: ("", after, before) for name, before, after in zip(tables, sides, sides[1:], strict=False)},
        example,
        traced=sized(1 + 2 * len(tables)),
        corners=(sized(1), sized(4)),
    )
    return replace(looking, outputs=(LOOKED,)), part
