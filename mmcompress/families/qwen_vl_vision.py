"""The vision towers of Qwen-VL models as passes see them: blocks, what counts them, what their configs say.

What differs is told by the config's model_type.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmcompress.families.anatomy import read_blocks
from mmcompress.families.block_names import QWEN2_VISION_BLOCK, QWEN3_VISION_BLOCK, QWEN25_VISION_BLOCK
from mmcompress.families.qwen_vl_parts import layout
from mmcompress.views import Block, Numbering, Tower

BLOCKS = {"qwen2_vl": QWEN2_VISION_BLOCK, "qwen2_5_vl": QWEN25_VISION_BLOCK, "qwen3_vl": QWEN3_VISION_BLOCK}
EXAMPLE_GRID = (1, 16, 16)
"""Frames, rows and columns of patches in an example picture, and in all that exported models see."""


def kind_of(model: Any) -> str:
    """Return the model_type; with experts, that of the model which differs in nothing else."""
    kind: str = model.config.model_type
    return kind.removesuffix("_moe")


def vision_tower(model: Any) -> Tower:
    """Return the view of the vision tower."""
    config, root = model.config.vision_config, "model.visual"
    heads, embeddings = [f"{root}.merger"], [f"{root}.patch_embed.proj"]
    numbered: list[tuple[str, str, Numbering]] = []
    needed: tuple[int, ...] = ()
    if kind_of(model) == "qwen2_5_vl":
        numbered = [(owner, "fullatt_block_indexes", "block") for owner in (root, "config.vision_config")]
    if kind_of(model) == "qwen3_vl":
        heads.append(f"{root}.deepstack_merger_list")
        embeddings.append(f"{root}.pos_embed")
        numbered = [(owner, "deepstack_visual_indexes", "block") for owner in (root, "config.vision_config")]
        needed = tuple(config.deepstack_visual_indexes)
    return Tower(
        name="vision",
        path=root,
        blocks_path=f"{root}.blocks",
        blocks=_vision_blocks(model, root),
        config="vision_config",
        depth_key="depth",
        heads=tuple(heads),
        embeddings=tuple(embeddings),
        numbered=tuple(numbered),
        needed=needed,
        packed=True,
        why_no_connector="a token's positions in the prompt are those of its patches in the picture, all of them",
        why_no_stream="the prompt keeps a place for each of the picture's tokens; fewer of them would not fill it",
    )


def _vision_blocks(model: Any, root: str) -> tuple[Block, ...]:
    config = model.config.vision_config
    blocks = read_blocks(model, f"{root}.blocks", BLOCKS[kind_of(model)], config.hidden_act)
    if kind_of(model) != "qwen2_5_vl":
        return blocks
    window = layout(config, EXAMPLE_GRID).mean_window
    return tuple(
        block
        if block.index in config.fullatt_block_indexes
        else replace(block, attention=replace(block.attention, window=window))
        for block in blocks
    )


def write_vision_config(model: Any, tower: Tower, width: int) -> None:
    """Write depth and widths into the config; `width` is that of the language model."""
    config = model.config.vision_config
    config.depth = len(tower.blocks)
    if kind_of(model) == "qwen3_vl":
        config.out_hidden_size = width
    neurons = {block.mlp.neurons for block in tower.blocks if block.mlp}
    if len(neurons) > 1:
        return
    if kind_of(model) == "qwen2_vl":
        # Its config knows only a whole ratio; other widths cannot be said.
        ratio, rest = divmod(neurons.pop(), config.embed_dim)
        config.mlp_ratio = config.mlp_ratio if rest else ratio
    else:
        config.intermediate_size = neurons.pop()
