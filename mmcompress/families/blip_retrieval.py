"""BlipForImageTextRetrieval: BLIP's ViT and BERT, each read at its first token and projected into one space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval

from mmcompress.families.blip_views import example_ids, example_pictures, text_tower, vision_tower, write_widths
from mmcompress.families.block_names import BLIP_TEXT_BLOCK
from mmcompress.families.two_tower import TwoTowers
from mmcompress.views import Tower

POST_NORM = "BERT blocks normalise after the residual; merging inside them is not implemented"


class BlipRetriever(TwoTowers):
    """BlipForImageTextRetrieval as a dual encoder, through its contrastive projections.

    Its text encoder reads a text alone then; the cross-attention inside, and the head that says whether a text matches a picture,
    stay as they are.
    """

    name = "blip_retrieval"
    model_types: tuple[str, ...] = ("blip",)
    architectures: tuple[str, ...] = ("BlipForImageTextRetrieval",)
    outside = ("itm_head",)

    def model_class(self, config: Any) -> type[nn.Module]:
        return BlipForImageTextRetrieval

    def towers(self, model: Any) -> tuple[Tower, ...]:
        keyless = "BLIP computes attention by itself and gives no keys to match tokens by"
        return (
            replace(vision_tower(model), heads=("vision_proj",), why_no_stream=keyless),
            replace(text_tower(model, BLIP_TEXT_BLOCK), heads=("text_proj",), why_no_stream=POST_NORM),
        )

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return the embeddings (B, C) of one tower: the projection of its first token; see `Family.encode`."""
        encoder, projection = (
            (model.vision_model, model.vision_proj) if tower == "vision" else (model.text_encoder, model.text_proj)
        )
        made: Tensor = projection(encoder(**inputs).last_hidden_state[:, 0])
        return made

    def similarity(self, model: Any) -> tuple[Tensor, Tensor]:
        """Return (1, 0): the model's own logits are cosines."""
        weight = model.text_proj.weight if isinstance(model.text_proj, nn.Linear) else model.vision_proj.weight
        return weight.new_ones(()), weight.new_zeros(())

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        if tower == "vision":
            return example_pictures(model, batch)
        ids = example_ids(model, batch)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def write_config(self, model: Any) -> None:
        """Write depth and MLP width of both towers; heads cannot be written (the head size would change)."""
        write_widths(model, self.towers(model))


FAMILY = BlipRetriever()
