"""Where the towers of BLIP models lie, and the inputs that their classes share.

Shape alphabet: B batch, N image tokens, T text tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import example_pixels, example_tokens, read_blocks, widths
from mmcompress.families.block_names import BLIP_VISION_BLOCK, BlockNames
from mmcompress.families.two_tower import in_dtype_of
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.data import Sample

EXAMPLE_TOKENS = 16


def vision_tower(model: Any) -> Tower:
    """Return the view of the ViT."""
    vision = model.config.vision_config
    return Tower(
        name="vision",
        path="vision_model",
        blocks_path="vision_model.encoder.layers",
        blocks=read_blocks(model, "vision_model.encoder.layers", BLIP_VISION_BLOCK, vision.hidden_act),
        config="vision_config",
        depth_key="num_hidden_layers",
        embeddings=("vision_model.embeddings.patch_embedding",),
    )


def text_tower(model: Any, names: BlockNames) -> Tower:
    """Return the view of the BERT that reads, whose blocks `names` describes."""
    path = "text_encoder.encoder.layer"
    return Tower(
        name="text",
        path="text_encoder",
        blocks_path=path,
        blocks=read_blocks(model, path, names, model.config.text_config.hidden_act),
        config="text_config",
        depth_key="num_hidden_layers",
        embeddings=tuple(f"text_encoder.embeddings.{table}_embeddings" for table in ("word", "position")),
    )


def pixels(model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return pixel_values (B, 3, H, W) of samples. Raises UsageError without an image processor, and what `Sample.image` does."""
    if processor.image is None:
        raise UsageError("this checkpoint has no image processor", hint="add its preprocessor_config.json")
    made = processor.image(images=[sample.image for sample in samples], return_tensors="pt")
    return in_dtype_of(model, {"pixel_values": made["pixel_values"]})


def lined_up(rows: Sequence[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (B, T), padded behind."""
    counts = torch.tensor([len(row) for row in rows])
    longest = int(counts.max())
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    return ids, (torch.arange(longest) < counts[:, None]).long()


def example_pictures(model: Any, batch: int) -> dict[str, Tensor]:
    """Return smooth pictures of the model's size."""
    side = model.config.vision_config.image_size
    return {"pixel_values": example_pixels(batch, 3, side, side)}


def example_ids(model: Any, batch: int) -> Tensor:
    """Return token ids (B, T) that end as a text does."""
    c = model.config.text_config
    return example_tokens(
        batch, min(EXAMPLE_TOKENS, c.max_position_embeddings), c.vocab_size, c.sep_token_id, c.pad_token_id
    )


def example_states(model: Any, batch: int) -> Tensor:
    """Return states (B, N, C) of the shape the ViT gives."""
    c = model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    tokens = (c.image_size // c.patch_size) ** 2 + 1
    return torch.randn(batch, tokens, c.hidden_size, generator=generator).to(next(model.parameters()).dtype)


def write_widths(model: Any, towers: Sequence[Tower]) -> None:
    """Write depth and, where all blocks have one, MLP width of towers."""
    for tower in towers:
        config = getattr(model.config, tower.config)
        config.num_hidden_layers = len(tower.blocks)
        found = widths(tower.blocks)
        if found:
            config.intermediate_size = found[1]
