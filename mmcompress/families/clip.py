"""CLIPModel: ViT with a class token, causal text tower read at the end-of-text token."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import CLIPModel

from mmcompress.families.anatomy import read_blocks, stream_width, widths
from mmcompress.families.block_names import CLIP_BLOCK
from mmcompress.families.two_tower import TwoTowers
from mmcompress.views import Positions, Residual, TokenStream, Tower


class Clip(TwoTowers):
    """OpenAI CLIP and everything saved as CLIPModel (OpenCLIP conversions, TinyCLIP, MetaCLIP)."""

    name = "clip"
    model_types: tuple[str, ...] = ("clip",)
    architectures: tuple[str, ...] = ("CLIPModel",)

    def model_class(self, config: Any) -> type[nn.Module]:
        return CLIPModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        text = model.config.text_config
        blocks = read_blocks(model, "text_model.encoder.layers", CLIP_BLOCK, text.hidden_act)
        tables = ("text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding")
        return (
            clip_vision(model),
            Tower(
                name="text",
                path="text_model",
                blocks_path="text_model.encoder.layers",
                blocks=blocks,
                config="text_config",
                depth_key="num_hidden_layers",
                heads=("text_projection",),
                embeddings=tables,
                positions=Positions("text_model.embeddings.position_embedding"),
                why_no_stream="CLIP reads its text at the end-of-text position, which merging would move",
                residual=Residual(
                    width=stream_width(model, blocks),
                    rows=tuple(f"{table}.weight" for table in tables),
                    makers=(),
                    norm="text_model.final_layer_norm",
                    readers=("text_projection",),
                ),
            ),
        )

    def end_of_text(self, config: Any) -> int:
        # Old CLIP configs name 2 as end of text, and the model then reads at the highest id.
        return int(config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id)

    def write_config(self, model: Any) -> None:
        write_clip_widths(self.towers(model), model.config)


def clip_vision(model: Any) -> Tower:
    """Return the vision tower of models that kept CLIP's: AltCLIP and Chinese-CLIP too."""
    vision = model.config.vision_config
    blocks = read_blocks(model, "vision_model.encoder.layers", CLIP_BLOCK, vision.hidden_act)
    return Tower(
        name="vision",
        path="vision_model",
        blocks_path="vision_model.encoder.layers",
        blocks=blocks,
        config="vision_config",
        depth_key="num_hidden_layers",
        heads=("visual_projection",),
        embeddings=("vision_model.embeddings.patch_embedding", "vision_model.embeddings.position_embedding"),
        stream=TokenStream(tokens=(vision.image_size // vision.patch_size) ** 2 + 1, protected=1, readout="class"),
        residual=Residual(
            width=stream_width(model, blocks),
            rows=(),
            makers=(),
            entry="vision_model.pre_layrnorm",
            norm="vision_model.post_layernorm",
            readers=("visual_projection",),
        ),
    )


def write_clip_widths(towers: tuple[Tower, ...], config: Any) -> None:
    """Write depth and MLP width of CLIP-shaped towers; heads cannot be written (the head size would change)."""
    for tower in towers:
        part = getattr(config, tower.config)
        part.num_hidden_layers = len(tower.blocks)
        found = widths(tower.blocks)
        if found:
            part.intermediate_size = found[1]


FAMILY = Clip()
