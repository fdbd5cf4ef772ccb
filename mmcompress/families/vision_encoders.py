"""Vision encoders that serve in several families: where their parts lie below the encoder's root, by `model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmcompress.families.anatomy import widths
from mmcompress.families.block_names import CLIP_BLOCK, DINOV2_BLOCK, VIT_BLOCK, BlockNames
from mmcompress.views import Block


@dataclass(frozen=True)
class VisionEncoder:
    """Paths are relative to the encoder."""

    blocks: str
    names: BlockNames
    embeddings: tuple[str, ...]
    class_tokens: int
    """Leading tokens that stand for no patch."""
    rows: tuple[str, ...] = ()
    """Parameters (…, C) whose rows go into the residual stream, where all that do is known."""
    norm: str = ""
    """Behind the last block."""


ROWS = ("embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings")
"""Of ViT and DINOv2; not every checkpoint has a mask token."""

VISION: dict[str, VisionEncoder] = {
    "vit": VisionEncoder("layers", VIT_BLOCK, ("embeddings.patch_embeddings.projection",), 1, ROWS, "layernorm"),
    "dinov2": VisionEncoder(
        "encoder.layer", DINOV2_BLOCK, ("embeddings.patch_embeddings.projection",), 1, ROWS, "layernorm"
    ),
    "clip_vision_model": VisionEncoder(
        "encoder.layers", CLIP_BLOCK, ("embeddings.patch_embedding", "embeddings.position_embedding"), 1
    ),
    "siglip_vision_model": VisionEncoder(
        "encoder.layers", CLIP_BLOCK, ("embeddings.patch_embedding", "embeddings.position_embedding"), 0
    ),
}


def write_vision_config(config: Any, blocks: tuple[Block, ...]) -> None:
    """Write depth and uniform widths into the config of an encoder in `VISION`, as far as it can say them."""
    config.num_hidden_layers = len(blocks)
    if config.model_type == "dinov2":
        # DINOv2's config also names the blocks a backbone would give out, the last by default.
        config.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(blocks) + 1))]
        config.set_output_features_output_indices(out_features=None, out_indices=None)
    found = widths(blocks)
    if not found:
        return
    heads, neurons = found
    width = blocks[0].attention.head_dim
    said = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    if config.model_type in ("vit", "dinov2") and (heads, width) != (config.num_attention_heads, said):
        # The others take the head size as width / heads.
        config.head_dim = width
        config.num_attention_heads = heads
    if config.model_type == "dinov2":
        # DINOv2's config knows only a whole ratio (transformers 5.23 checks its type); other widths cannot be said.
        if neurons % config.hidden_size == 0:
            config.mlp_ratio = neurons // config.hidden_size
    else:
        config.intermediate_size = neurons
