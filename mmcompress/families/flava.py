"""FlavaModel: a ViT and a BERT of pre-norm blocks, embedded by the first token of each; an encoder of both stays aside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import FlavaModel

from mmcompress.families.anatomy import read_blocks, widths
from mmcompress.families.block_names import FLAVA_BLOCK
from mmcompress.families.text_encoders import bert_text
from mmcompress.families.two_tower import TwoTowers, in_dtype_of
from mmcompress.views import Tower

ITSELF = "FLAVA computes attention by itself and gives no keys to match tokens by"


class Flava(TwoTowers):
    """FLAVA as a dual encoder, through its contrastive projections.

    The multimodal encoder takes the states of both towers and embeds into no shared space: it is kept, and not compressed. A
    checkpoint of FlavaForPreTraining becomes one of this class by `FlavaModel.from_pretrained(...).save_pretrained(...)`.
    """

    name = "flava"
    model_types: tuple[str, ...] = ("flava",)
    architectures: tuple[str, ...] = ("FlavaModel",)
    vision_key = "image_config"
    outside = ("multimodal_model", "image_to_mm_projection", "text_to_mm_projection")

    def model_class(self, config: Any) -> type[nn.Module]:
        return FlavaModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        image = model.config.image_config
        return (
            Tower(
                name="vision",
                path="image_model",
                blocks_path="image_model.encoder.layer",
                blocks=read_blocks(model, "image_model.encoder.layer", FLAVA_BLOCK, image.hidden_act),
                config="image_config",
                depth_key="num_hidden_layers",
                heads=("image_projection",),
                embeddings=("image_model.embeddings.patch_embeddings.projection",),
                why_no_stream=ITSELF,
            ),
            bert_text(model, names=FLAVA_BLOCK, why_no_stream=ITSELF),
        )

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return the embeddings (B, C) of one tower: the projection of its first token; see `Family.encode`."""
        encoder, projection = (
            (model.image_model, model.image_projection)
            if tower == "vision"
            else (model.text_model, model.text_projection)
        )
        made: Tensor = projection(encoder(**in_dtype_of(model, inputs)).last_hidden_state[:, 0])
        return made

    def write_config(self, model: Any) -> None:
        """Write depth and MLP width of both towers; heads cannot be written (the head size would change)."""
        for tower in self.towers(model):
            config = getattr(model.config, tower.config)
            config.num_hidden_layers = len(tower.blocks)
            found = widths(tower.blocks)
            if found:
                config.intermediate_size = found[1]


FAMILY = Flava()
