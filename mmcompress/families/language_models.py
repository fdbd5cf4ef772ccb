"""Language models that serve in several families: one decoder stack of Llama's shape, with its word table and output layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcompress.errors import UsageError, closest
from mmcompress.families.anatomy import read_blocks
from mmcompress.families.block_names import LLAMA_BLOCK, QWEN_LANGUAGE_BLOCK, QWEN_MIXTURE_BLOCK, BlockNames
from mmcompress.views import Block, Residual, Tower

LANGUAGE: dict[str, BlockNames] = {
    "llama": LLAMA_BLOCK,
    "mistral": LLAMA_BLOCK,
    "smollm3": LLAMA_BLOCK,
    "qwen2": LLAMA_BLOCK,
    "qwen3": LLAMA_BLOCK,
    "gemma": LLAMA_BLOCK,
    "gemma2": LLAMA_BLOCK,
    "qwen2_vl_text": QWEN_LANGUAGE_BLOCK,
    "qwen2_5_vl_text": QWEN_LANGUAGE_BLOCK,
    "qwen3_vl_text": LLAMA_BLOCK,
    "qwen3_vl_moe_text": QWEN_MIXTURE_BLOCK,
}


SCALED = ("gemma", "gemma2")
"""Those whose words are multiplied by the root of the stream's width, and what norms give out by 1 + their weight."""
SAYS_WIDTH = ("llama", "mistral", "smollm3", "qwen3", "qwen3_vl_text")
"""Those whose config says a head's width apart from the stream's."""


def require_language(family: str, kind: str) -> None:
    """Raise UsageError where the language model's `model_type` is none of `LANGUAGE`."""
    if kind not in LANGUAGE:
        raise UsageError(
            f"{family} with a '{kind}' language model is not supported",
            hint=f"{closest(kind, LANGUAGE)}; add a line in mmcompress/families/language_models.py",
        )


def language_tower(model: Any, path: str, makers: Sequence[str] = (), rows: Sequence[str] = ()) -> Tower:
    """Return the view of the language model at `path`, with the output layer `lm_head`.

    `makers`: paths of the Linears that make what goes in beside words; `rows`: names of parameters (…, C) that do.
    """
    config = model.config.text_config
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    table = f"{path}.embed_tokens"
    # Asked of parameters alone: a quantized layer would make all its floats to answer.
    first, last = (dict(model.get_submodule(place).named_parameters()).get("weight") for place in (table, "lm_head"))
    tied = first is not None and first is last
    per_block = tuple(
        ("config.text_config", key, "each") for key in ("layer_types", "no_rope_layers") if getattr(config, key, None)
    )
    blocks = read_blocks(model, f"{path}.layers", LANGUAGE[config.model_type], activation)
    why_no_residual = _why_no_residual(config.model_type, blocks)
    return Tower(
        name="language",
        path=path,
        blocks_path=f"{path}.layers",
        blocks=blocks,
        config="text_config",
        depth_key="num_hidden_layers",
        heads=("lm_head",),
        embeddings=(table,),
        tied=((table, "lm_head"),) if tied else (),
        numbered=per_block,  # type: ignore[arg-type]
        why_no_stream="the tokens of an answer follow one another, and each is needed",
        residual=None if why_no_residual else Residual(
            width=model.get_submodule(table).embedding_dim,
            rows=(f"{table}.weight", *rows),
            makers=tuple(makers),
            norm=f"{path}.norm",
            readers=("lm_head",),
        ),
        why_no_residual=why_no_residual,
    )  # fmt: skip


def _why_no_residual(kind: str, blocks: Sequence[Block]) -> str:
    """Return why the stream cannot become narrower, "" where it can."""
    if kind in SCALED:
        return f"{kind} multiplies words by the root of the stream's width, and norms by 1 + their weight"
    return "routers and experts read it through no Linear" if any(block.experts for block in blocks) else ""


def write_language_config(config: Any, tower: Tower) -> None:
    """Write depth and uniform widths of the blocks into the config, heads and the stream's width where it can say them."""
    blocks = tower.blocks
    config.num_hidden_layers = len(blocks)
    neurons = {block.mlp.neurons for block in blocks if block.mlp}
    if len(neurons) == 1:
        config.intermediate_size = neurons.pop()
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers, config.decoder_sparse_step = [block.index for block in blocks if block.mlp], 1
        experts = {block.experts.experts for block in blocks if block.experts}
        config.num_experts = experts.pop() if len(experts) == 1 else config.num_experts
    heads = {(block.attention.heads, block.attention.kv_heads) for block in blocks}
    if len(heads) == 1 and getattr(config, "head_dim", None) is not None:
        config.num_attention_heads, config.num_key_value_heads = heads.pop()
    if tower.residual and config.model_type in SAYS_WIDTH:
        # transformers (5.23) refuses Llamas whose width their heads do not divide, though heads have a width of their own.
        whole = config.model_type != "llama" or tower.residual.width % config.num_attention_heads == 0
        config.hidden_size = tower.residual.width if whole else config.hidden_size
