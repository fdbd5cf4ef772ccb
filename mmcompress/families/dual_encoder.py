"""VisionTextDualEncoderModel: a ViT or DINOv2 vision tower beside a BERT-like text tower, joined by two projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import VisionTextDualEncoderModel

from mmcompress.bundle import TokenStream, Tower
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import (
    BERT_BLOCK,
    DINOV2_BLOCK,
    VIT_BLOCK,
    BlockNames,
    example_pixels,
    example_tokens,
    read_blocks,
    widths,
)
from mmcompress.families.two_tower import TwoTowers

VISION: dict[str, tuple[str, BlockNames]] = {
    "vit": ("vision_model.layers", VIT_BLOCK),
    "dinov2": ("vision_model.encoder.layer", DINOV2_BLOCK),
}
TEXT: dict[str, tuple[str, BlockNames]] = {"bert": ("text_model.encoder.layer", BERT_BLOCK)}


class DualEncoder(TwoTowers):
    """Any pair of a vision model in `VISION` and a text model in `TEXT`."""

    name = "dual_encoder"
    model_types: tuple[str, ...] = ("vision-text-dual-encoder",)
    architectures: tuple[str, ...] = ("VisionTextDualEncoderModel",)
    text_inputs = ("input_ids", "attention_mask")

    def model_class(self, config: Any) -> type[nn.Module]:
        for part, known in ((config.vision_config, VISION), (config.text_config, TEXT)):
            if part.model_type not in known:
                raise UsageError(
                    f"a dual encoder with a '{part.model_type}' tower is not supported",
                    hint=f"supported: {', '.join((*VISION, *TEXT))}; add a line in mmcompress/families/dual_encoder.py",
                )
        if getattr(config.vision_config, "use_swiglu_ffn", False):
            raise UsageError(
                "DINOv2 with gated MLPs (the giant) is not supported", hint="use DINOv2 small, base or large"
            )
        return VisionTextDualEncoderModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        vision, text = model.config.vision_config, model.config.text_config
        vision_blocks, vision_names = VISION[vision.model_type]
        text_blocks, text_names = TEXT[text.model_type]
        return (
            Tower(
                name="vision",
                path="vision_model",
                blocks_path=vision_blocks,
                blocks=read_blocks(model, vision_blocks, vision_names, vision.hidden_act),
                config="vision_config",
                depth_key="num_hidden_layers",
                heads=("visual_projection",),
                embeddings=("vision_model.embeddings.patch_embeddings.projection",),
                stream=TokenStream(
                    tokens=(vision.image_size // vision.patch_size) ** 2 + 1, protected=1, readout="class"
                ),
            ),
            Tower(
                name="text",
                path="text_model",
                blocks_path=text_blocks,
                blocks=read_blocks(model, text_blocks, text_names, text.hidden_act),
                config="text_config",
                depth_key="num_hidden_layers",
                heads=("text_projection",),
                embeddings=tuple(
                    f"text_model.embeddings.{table}_embeddings" for table in ("word", "position", "token_type")
                ),
                why_no_stream="BERT blocks normalise after the residual; merging inside them is not implemented",
            ),
        )

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        if tower == "vision":
            c = model.config.vision_config
            return {"pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size)}
        c = model.config.text_config
        ids = example_tokens(batch, min(16, c.max_position_embeddings), c.vocab_size, 2)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def write_config(self, model: Any) -> None:
        vision, text = self.towers(model)
        config = model.config.vision_config
        config.num_hidden_layers = len(vision.blocks)
        if config.model_type == "dinov2":
            # DINOv2's config also names the blocks a backbone would give out, the last by default.
            config.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(vision.blocks) + 1))]
            config.set_output_features_output_indices(out_features=None, out_indices=None)
        found = widths(vision.blocks)
        if found:
            heads, neurons = found
            if heads != config.num_attention_heads:
                config.head_dim = vision.blocks[0].attention.head_dim
                config.num_attention_heads = heads
            if config.model_type == "dinov2":
                # DINOv2's config knows only a whole ratio (transformers 5.23 checks its type); other widths cannot be said.
                if neurons % config.hidden_size == 0:
                    config.mlp_ratio = neurons // config.hidden_size
            else:
                config.intermediate_size = neurons
        config = model.config.text_config
        config.num_hidden_layers = len(text.blocks)
        found = widths(text.blocks)
        if found:
            config.intermediate_size = found[1]


FAMILY = DualEncoder()
