"""The BERT-like text encoder that stands beside many a vision or audio encoder."""

from __future__ import annotations

from typing import Any

from mmcompress.families.anatomy import read_blocks
from mmcompress.families.block_names import BERT_BLOCK, BlockNames
from mmcompress.surgery.coarsening import openers
from mmcompress.views import Line, Positions, Tower

POST_NORM = "BERT blocks normalise after the residual; merging inside them is not implemented"
NORMS_INSIDE = "its blocks put a norm over what they have added to, and the norm's gains turn with no rotation"


def bert_text(
    model: Any,
    inner: str = "",
    stack: str = "encoder.layer",
    names: BlockNames = BERT_BLOCK,
    why_no_stream: str = POST_NORM,
    first: int = 0,
) -> Tower:
    """Return the text tower `text_model` of a dual encoder; BERT itself lies at `inner` in it, its blocks at `stack` in BERT.

    `first` is the row of the first token in the table of places, which in a RoBERTa is not 0.
    """
    root = f"text_model.{inner}".rstrip(".")
    stack = f"{root}.{stack}"
    blocks = read_blocks(model, stack, names, model.config.text_config.hidden_act)
    return Tower(
        name="text",
        path="text_model",
        blocks_path=stack,
        blocks=blocks,
        config="text_config",
        depth_key="num_hidden_layers",
        heads=("text_projection",),
        embeddings=tuple(f"{root}.embeddings.{table}_embeddings" for table in ("word", "position", "token_type")),
        positions=Positions(f"{root}.embeddings.position_embeddings", first),
        needed=openers(model, [block.path for block in blocks]),
        line=Line(protected=1) if names is BERT_BLOCK else None,
        why_no_stream=why_no_stream,
        why_no_residual=NORMS_INSIDE if names is BERT_BLOCK else "",
    )
