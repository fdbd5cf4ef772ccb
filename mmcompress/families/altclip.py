"""AltCLIPModel: CLIP's vision tower beside XLM-RoBERTa, which one Linear turns into the text tower of another CLIP."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AltCLIPModel

from mmcompress.families.anatomy import roberta_positions
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
            bert_text(model, "roberta", "encoder.layers", first=self.text_config(model).pad_token_id + 1),
        )

    def text_limit(self, model: Any) -> int:
        return roberta_positions(self.text_config(model))

    def end_of_text(self, config: Any) -> int:
        return int(config.eos_token_id)

    def write_config(self, model: Any) -> None:
        write_clip_widths(self.towers(model), model.config)


FAMILY = AltClip()
