"""SmolVLM and Idefics3: a picture as a whole and in tiles, a SigLIP-like encoder, a connector that folds patches, a Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from mmcompress.bundle import Processor
from mmcompress.errors import NotExportable
from mmcompress.families.anatomy import example_pixels, read_blocks, widths
from mmcompress.families.block_names import CLIP_BLOCK
from mmcompress.families.talk import Talk
from mmcompress.families.vision_language import VisionLanguage
from mmcompress.families.vision_language_parts import vision_part
from mmcompress.parts import Part
from mmcompress.surgery.reducing import handed_on
from mmcompress.views import Connector, TokenStream, Tower

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES: dict[str, type[nn.Module]] = {
    "smolvlm": SmolVLMForConditionalGeneration,
    "idefics3": Idefics3ForConditionalGeneration,
}
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
"""Tokens around each tile, and before the picture as a whole."""


class SmolVLM(VisionLanguage):
    """Both: a picture's tiles row by row, then the whole picture."""

    name = "smolvlm"
    model_types: tuple[str, ...] = tuple(CLASSES)
    architectures: tuple[str, ...] = tuple(made.__name__ for made in CLASSES.values())
    language = "model.text_model"
    image_keys = ("pixel_values", "pixel_attention_mask")
    talk = Talk(without_template=None)

    def model_class(self, config: Any) -> type[nn.Module]:
        self.check_config(config)
        return CLASSES[config.model_type]

    def vision_tower(self, model: Any) -> Tower:
        config, root = model.config.vision_config, "model.vision_model"
        return Tower(
            name="vision",
            path=root,
            blocks_path=f"{root}.encoder.layers",
            blocks=read_blocks(model, f"{root}.encoder.layers", CLIP_BLOCK, config.hidden_act),
            config="vision_config",
            depth_key="num_hidden_layers",
            heads=("model.connector",),
            embeddings=(f"{root}.embeddings.patch_embedding", f"{root}.embeddings.position_embedding"),
            connector=Connector("model.connector", self._side(model) ** 2, (self._side(model), self._side(model))),
            stream=TokenStream(tokens=(config.image_size // config.patch_size) ** 2, protected=0, readout="all"),
        )

    def makers(self, model: Any) -> tuple[str, ...]:
        return ("model.connector.modality_projection.proj",)

    def image_inputs(self, model: Any, processor: Processor, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return pixel_values (B, tiles, 3, H, W), pixel_attention_mask (B, tiles, H, W) and tiles (B, 2), rows and columns."""
        made = processor.image(images=[[image] for image in images], return_row_col_info=True, return_tensors="pt")
        tiles = torch.tensor([[rows[0], columns[0]] for rows, columns in zip(made["rows"], made["cols"], strict=True)])
        return {key: made[key] for key in self.image_keys} | {"tiles": tiles}

    def example_images(self, model: Any, batch: int) -> dict[str, Tensor]:
        side = model.config.vision_config.image_size
        return {
            "pixel_values": example_pixels(batch, model.config.vision_config.num_channels, side, side)[:, None],
            "pixel_attention_mask": torch.ones(batch, 1, side, side, dtype=torch.long),
        }

    def looked_at(self, model: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return pixel_values (R, 3, H, W) of all tiles. Raises UsageError for a picture that does not fill its tile."""
        pixels, mask = images["pixel_values"].flatten(0, 1), images["pixel_attention_mask"].flatten(0, 1)
        there = mask.flatten(1).any(-1)
        if not mask[there].all():
            raise NotExportable(
                "the picture does not fill its tile, and the exported vision part knows no padding",
                hint="use square pictures, or answer with the checkpoint",
            )
        return {"pixel_values": pixels[there]}

    def vision_graph(self, model: Any) -> Part:
        return vision_part(self._look, lambda count: self.looked_at(model, self.example_images(model, count)))

    @staticmethod
    def _look(model: Any, pixels: Tensor) -> Tensor:
        """Return image_embeds (R, N, C) of full tiles; the model's own way counts each one's patches."""
        vision = model.model.vision_model
        patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        states = patches + vision.embeddings.position_embedding(
            torch.tensor(_places(vision.embeddings.num_patches_per_side))
        )
        tokens: Tensor = model.model.connector(vision.post_layernorm(vision.encoder(states).last_hidden_state))
        return tokens

    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        token = self.talk.tokenizer(processor).convert_ids_to_tokens(model.config.image_token_id)
        each = token * self.example_image_tokens(model)
        rows, columns = inputs["tiles"][row].tolist()
        tiles = "".join(
            "".join(f"{AROUND}<row_{r + 1}_col_{c + 1}>{each}" for c in range(columns)) + "\n" for r in range(rows)
        )
        line = "\n" if tiles else ""
        return f"{tiles}{line}{AROUND}{WHOLE}{each}{AROUND}"

    def example_image_tokens(self, model: Any) -> int:
        return handed_on(model.model.connector, self._side(model) ** 2)

    @staticmethod
    def _side(model: Any) -> int:
        """Return how many of its tokens a tile is wide and high."""
        c = model.config
        return int(c.vision_config.image_size // c.vision_config.patch_size // c.scale_factor)

    def write_vision_config(self, model: Any, tower: Tower) -> None:
        config = model.config.vision_config
        config.num_hidden_layers = len(tower.blocks)
        found = widths(tower.blocks)
        if found:
            config.intermediate_size = found[1]


def _places(side: int) -> list[int]:
    """Return the index of each patch's position in the table, for a full picture of `side` x `side` patches.

    Not simply 0, 1, 2: the model puts patches into buckets by fractions in float32, whose rounding it was trained with.
    """
    fractions = np.minimum(np.arange(side, dtype=np.float32) * np.float32(1 / side), np.float32(1 - 1e-6))
    buckets = np.digitize(fractions, (np.arange(1, side) / side).astype(np.float32))
    found: list[int] = (buckets[:, None] * side + buckets[None, :]).flatten().tolist()
    return found


FAMILY = SmolVLM()
