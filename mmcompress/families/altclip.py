"""AltCLIPModel: CLIP's vision tower beside XLM-RoBERTa, which one Linear turns into the text tower of another CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AltCLIPModel

from mmcompress.families.anatomy import example_pixels, example_tokens, roberta_positions
from mmcompress.families.clip import clip_vision, write_clip_widths
from mmcompress.families.text_encoders import bert_text
from mmcompress.families.two_tower import TwoTowers
from mmcompress.views import Tower


class AltClip(TwoTowers):
    """BAAI's AltCLIP, bilingual and the one of nine and eighteen languages."""

    name = "altclip"
    model_types: tuple[str, ...] = ("altclip",)
    architectures: tuple[str, ...] = ("AltCLIPModel",)

    def model_class(self, config: Any) -> type[nn.Module]:
        return AltCLIPModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        return (
            clip_vision(model),
            bert_text(model, "roberta", "encoder.layers"),
        )

    def text_limit(self, model: Any) -> int:
        return roberta_positions(self.text_config(model))

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        if tower == "vision":
            c = model.config.vision_config
            return {"pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size)}
        c = model.config.text_config
        ids = example_tokens(batch, min(16, self.text_limit(model)), c.vocab_size, c.eos_token_id, c.pad_token_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def write_config(self, model: Any) -> None:
        write_clip_widths(self.towers(model), model.config)


FAMILY = AltClip()
