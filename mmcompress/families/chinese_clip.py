"""ChineseCLIPModel: CLIP's vision tower beside a Chinese BERT, read at its first token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ChineseCLIPModel

from mmcompress.families.anatomy import example_pixels, example_tokens
from mmcompress.families.clip import clip_vision, write_clip_widths
from mmcompress.families.text_encoders import bert_text
from mmcompress.families.two_tower import TwoTowers
from mmcompress.views import Tower


class ChineseClip(TwoTowers):
    """Chinese-CLIP of OFA-Sys, ViT variants."""

    name = "chinese_clip"
    model_types: tuple[str, ...] = ("chinese_clip",)
    architectures: tuple[str, ...] = ("ChineseCLIPModel",)

    def model_class(self, config: Any) -> type[nn.Module]:
        return ChineseCLIPModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        return (
            clip_vision(model),
            bert_text(model),
        )

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        if tower == "vision":
            c = model.config.vision_config
            return {"pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size)}
        c = model.config.text_config
        ids = example_tokens(batch, min(16, c.max_position_embeddings), c.vocab_size, 2)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def write_config(self, model: Any) -> None:
        write_clip_widths(self.towers(model), model.config)


FAMILY = ChineseClip()
