"""VisionTextDualEncoderModel: a ViT or DINOv2 vision tower beside a BERT-like text tower, joined by two projections."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import VisionTextDualEncoderModel

from mmcompress.errors import UsageError
from mmcompress.families.anatomy import read_blocks, stream_width, widths
from mmcompress.families.text_encoders import bert_text
from mmcompress.families.two_tower import TwoTowers
from mmcompress.families.vision_encoders import VISION, write_vision_config
from mmcompress.views import Residual, TokenStream, Tower

VISION_TYPES = ("vit", "dinov2")
TEXT_TYPES = ("bert",)


class DualEncoder(TwoTowers):
    """Any pair of a vision model in `VISION_TYPES` and a text model in `TEXT_TYPES`."""

    name = "dual_encoder"
    model_types: tuple[str, ...] = ("vision-text-dual-encoder",)
    architectures: tuple[str, ...] = ("VisionTextDualEncoderModel",)
    text_inputs = ("input_ids", "attention_mask")

    def model_class(self, config: Any) -> type[nn.Module]:
        for part, known in ((config.vision_config, VISION_TYPES), (config.text_config, TEXT_TYPES)):
            if part.model_type not in known:
                raise UsageError(
                    f"a dual encoder with a '{part.model_type}' tower is not supported",
                    hint=f"supported: {', '.join((*VISION_TYPES, *TEXT_TYPES))}; add a line in mmcompress/families/dual_encoder.py",
                )
        if getattr(config.vision_config, "use_swiglu_ffn", False):
            raise UsageError(
                "DINOv2 with gated MLPs (the giant) is not supported", hint="use DINOv2 small, base or large"
            )
        return VisionTextDualEncoderModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        vision = model.config.vision_config
        encoder = VISION[vision.model_type]
        vision_blocks = f"vision_model.{encoder.blocks}"
        blocks = read_blocks(model, vision_blocks, encoder.names, vision.hidden_act)
        embeddings = tuple(f"vision_model.{path}" for path in encoder.embeddings)
        parameters = dict(model.vision_model.named_parameters())
        # ViT's first token goes through one more layer before the projection.
        pools = getattr(model.vision_model, "pooler", None) is not None
        return (
            Tower(
                name="vision",
                path="vision_model",
                blocks_path=vision_blocks,
                blocks=blocks,
                config="vision_config",
                depth_key="num_hidden_layers",
                heads=("visual_projection",),
                embeddings=embeddings,
                stream=TokenStream(
                    tokens=(vision.image_size // vision.patch_size) ** 2 + 1, protected=1, readout="class"
                ),
                residual=Residual(
                    width=stream_width(model, blocks),
                    rows=tuple(f"vision_model.{row}" for row in encoder.rows if row in parameters),
                    makers=embeddings,
                    norm=f"vision_model.{encoder.norm}",
                    readers=("vision_model.pooler.dense" if pools else "visual_projection",),
                ),
            ),
            bert_text(model),
        )

    def write_config(self, model: Any) -> None:
        vision, text = self.towers(model)
        write_vision_config(model.config.vision_config, vision.blocks)
        config = model.config.text_config
        config.num_hidden_layers = len(text.blocks)
        found = widths(text.blocks)
        if found:
            config.intermediate_size = found[1]


FAMILY = DualEncoder()
