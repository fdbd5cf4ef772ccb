"""SiglipModel and Siglip2Model: no class token, the image is read by attention pooling over all tokens.

SigLIP 2 takes patches of images of any aspect ratio, padded to one length with a mask (NaFlex).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Siglip2Model, SiglipModel

from mmcompress.families.anatomy import example_pixels, example_tokens, read_blocks, stream_width
from mmcompress.families.block_names import CLIP_BLOCK
from mmcompress.families.clip import write_clip_widths
from mmcompress.families.two_tower import TwoTowers
from mmcompress.ops.grids import resize_grid
from mmcompress.views import Residual, TokenStream, Tower


class Siglip(TwoTowers):
    """SigLIP (fixed resolution) and SigLIP 2 (patches with a mask)."""

    name = "siglip"
    model_types: tuple[str, ...] = ("siglip", "siglip2")
    architectures: tuple[str, ...] = ("SiglipModel", "Siglip2Model")
    pad_to_limit = True
    # transformers' tokenizer for SigLIP gives no mask, and the models were trained without one.
    text_inputs = ("input_ids",)

    def model_class(self, config: Any) -> type[nn.Module]:
        return Siglip2Model if config.model_type == "siglip2" else SiglipModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        vision, text = model.config.vision_config, model.config.text_config
        patches = vision.num_patches if self._flexible(model) else (vision.image_size // vision.patch_size) ** 2
        has_head = getattr(model.vision_model, "head", None) is not None
        seen = read_blocks(model, "vision_model.encoder.layers", CLIP_BLOCK, vision.hidden_act)
        told = read_blocks(model, "text_model.encoder.layers", CLIP_BLOCK, text.hidden_act)
        tables = ("text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding")
        return (
            Tower(
                name="vision",
                path="vision_model",
                blocks_path="vision_model.encoder.layers",
                blocks=seen,
                config="vision_config",
                depth_key="num_hidden_layers",
                embeddings=("vision_model.embeddings.patch_embedding", "vision_model.embeddings.position_embedding"),
                stream=TokenStream(
                    tokens=patches,
                    protected=0,
                    readout="attention" if has_head else "all",
                    pool="vision_model.head.attention" if has_head else "",
                ),
                residual=Residual(
                    width=stream_width(model, seen),
                    rows=("vision_model.embeddings.position_embedding.weight",),
                    makers=("vision_model.embeddings.patch_embedding",),
                    norm="vision_model.post_layernorm",
                ),
            ),
            Tower(
                name="text",
                path="text_model",
                blocks_path="text_model.encoder.layers",
                blocks=told,
                config="text_config",
                depth_key="num_hidden_layers",
                embeddings=tables,
                why_no_stream="SigLIP reads its text at the last position, which merging would move",
                residual=Residual(
                    width=stream_width(model, told),
                    rows=tuple(f"{table}.weight" for table in tables),
                    makers=(),
                    norm="text_model.final_layer_norm",
                    readers=("text_model.head",),
                ),
            ),
        )

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        if tower == "text":
            c = model.config.text_config
            return {"input_ids": example_tokens(batch, c.max_position_embeddings, c.vocab_size, 1)}
        c = model.config.vision_config
        if not self._flexible(model):
            return {"pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size)}
        side = int(c.num_patches**0.5)
        pixels = example_pixels(batch, c.num_channels, side * c.patch_size, side * c.patch_size)
        # (B, channels, H, W) -> (B, N, patch * patch * channels)
        patches = nn.functional.unfold(pixels, c.patch_size, stride=c.patch_size).transpose(1, 2)
        patches = patches.unflatten(2, (c.num_channels, -1)).transpose(2, 3).flatten(2)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.int32),
            "spatial_shapes": torch.full((batch, 2), side),
        }

    @contextlib.contextmanager
    def exporting(self, model: Any) -> Iterator[None]:
        """SigLIP 2 resizes its position table in a loop over images, with sizes read from a tensor; see `ops.grids`."""
        if not self._flexible(model):
            yield
            return
        embeddings = model.vision_model.embeddings
        embeddings.resize_positional_embeddings = _resize_positions
        try:
            yield
        finally:
            del embeddings.resize_positional_embeddings

    def write_config(self, model: Any) -> None:
        head = getattr(model.vision_model, "head", None)
        before = model.config.vision_config.intermediate_size
        write_clip_widths(self.towers(model), model.config)
        if head is not None:
            # The pooling head has an MLP of its own, and the config one width for it and the blocks.
            model.config.vision_config.intermediate_size = before

    @staticmethod
    def _flexible(model: Any) -> bool:
        return bool(model.config.model_type == "siglip2")


def _resize_positions(table: Tensor, shapes: Tensor, max_length: int) -> Tensor:
    return resize_grid(table, shapes, max_length)


FAMILY = Siglip()
