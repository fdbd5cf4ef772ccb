"""ChineseCLIPModel: CLIP's vision tower beside a Chinese BERT, read at its first token."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ChineseCLIPModel

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

    def write_config(self, model: Any) -> None:
        write_clip_widths(self.towers(model), model.config)


FAMILY = ChineseClip()
