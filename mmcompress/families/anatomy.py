"""Reading views out of modules: where the parts of a block lie in each of transformers' block classes.

One `BlockNames` per block class; families say which one a tower is built of. Paths inside are relative to the block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from mmcompress.surgery.experts import stacked_shape
from mmcompress.views import Attention, Block, Counts, Experts, Mlp


@dataclass(frozen=True)
class BlockNames:
    """Relative paths inside one block class."""

    attention: str
    writers: tuple[str, ...]
    """Of queries, keys and values, or one that makes all three."""
    reader: str
    head_dim: str
    """Attribute of the attention module that holds D."""
    mlp: str
    """The module of the feed-forward, "" where its Linears lie in the block itself."""
    mlp_writers: tuple[str, ...]
    mlp_reader: str
    attend: tuple[str, ...] = ()
    feed: tuple[str, ...] = ()
    bookkeeping: tuple[tuple[str, Counts], ...] = ()
    """Attributes of the attention module that count heads, or heads * D; D itself and what follows from it have their own."""
    cross: str = ""
    """The attention over an encoder's output, built like the other one inside."""
    per_head: tuple[str, ...] = ()
    """Parameters with a column for each head."""
    scale: str = ""
    """Attribute of the attention module that holds the factor of its logits, where it computes that once."""
    why_whole: str = ""
    """Why the attention's heads cannot be cut."""
    why_rigid: str = ""
    """Why they cannot become narrower."""
    norms: tuple[str, ...] = ()
    """Of a pre-norm block: the norms before attention and feed-forward, where these are all that reads the block's stream."""
    scales: tuple[str, ...] = ()
    """Parameters (C,) that multiply what attention and feed-forward give out."""
    experts: str = ""
    """Where some blocks have a mixture of experts: the module that holds them, in those."""
    stacked: tuple[str, ...] = ()
    """Parameters of the experts; the last one's columns are an expert's neurons."""
    router: str = ""
    top: str = ""
    """Attribute of the router: how many experts a token goes through."""
    experts_counted: tuple[str, ...] = ()
    """Attributes that count experts."""


ROTARY = "the places of tokens turn the channels of their queries and keys in pairs"

CLIP_BLOCK = BlockNames(
    attention="self_attn",
    writers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    reader="self_attn.out_proj",
    head_dim="head_dim",
    mlp="mlp",
    mlp_writers=("mlp.fc1",),
    mlp_reader="mlp.fc2",
    attend=("layer_norm1", "self_attn"),
    feed=("layer_norm2", "mlp"),
    bookkeeping=(("num_heads", "heads"),),
    norms=("layer_norm1", "layer_norm2"),
    scale="scale",
)
"""CLIP, SigLIP and SigLIP 2, both towers."""

VIT_BLOCK = BlockNames(
    attention="attention",
    writers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    reader="attention.o_proj",
    head_dim="head_dim",
    mlp="mlp",
    mlp_writers=("mlp.fc1",),
    mlp_reader="mlp.fc2",
    attend=("layernorm_before", "attention", "dropout"),
    feed=("layernorm_after", "mlp", "dropout"),
    bookkeeping=(("num_attention_heads", "heads"),),
    norms=("layernorm_before", "layernorm_after"),
    scale="scaling",
)

DINOV2_BLOCK = BlockNames(
    attention="attention",
    writers=VIT_BLOCK.writers,
    reader=VIT_BLOCK.reader,
    head_dim="head_dim",
    mlp="mlp",
    mlp_writers=("mlp.fc1",),
    mlp_reader="mlp.fc2",
    attend=("norm1", "attention", "layer_scale1", "drop_path"),
    feed=("norm2", "mlp", "layer_scale2", "drop_path"),
    bookkeeping=(("num_attention_heads", "heads"),),
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    scale="scaling",
)

BERT_BLOCK = BlockNames(
    attention="attention",
    writers=("attention.self.query", "attention.self.key", "attention.self.value"),
    reader="attention.output.dense",
    head_dim="self.attention_head_size",
    mlp="intermediate",
    mlp_writers=("intermediate.dense",),
    mlp_reader="output.dense",
    bookkeeping=(("self.num_attention_heads", "heads"), ("self.all_head_size", "width")),
    scale="self.scaling",
)
"""Post-norm, so `attend` and `feed` stay empty."""

CLAP_AUDIO_BLOCK = replace(BERT_BLOCK, scale="", per_head=("attention.self.relative_position_bias_table",))
"""Pre-norm, but attention sees windows of the tokens: `attend` cannot say that."""

BLIP_VISION_BLOCK = BlockNames(
    attention="self_attn",
    writers=("self_attn.qkv",),
    reader="self_attn.projection",
    head_dim="head_dim",
    mlp="mlp",
    mlp_writers=("mlp.fc1",),
    mlp_reader="mlp.fc2",
    bookkeeping=(("num_heads", "heads"),),
    why_whole="BLIP computes how wide a head is from the hidden size and the number of heads",
)
"""Pre-norm; its attention takes no function by name, so it gives no keys to match tokens by."""

BLIP_TEXT_BLOCK = replace(BERT_BLOCK, scale="")
BLIP_DECODER_BLOCK = replace(BLIP_TEXT_BLOCK, cross="crossattention")

FLAVA_BLOCK = replace(
    BERT_BLOCK,
    writers=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    head_dim="attention.attention_head_size",
    scale="",
    bookkeeping=(("attention.num_attention_heads", "heads"), ("attention.all_head_size", "width")),
)
"""FLAVA and ViLT. Pre-norm; their attention takes no function by name, so it gives no keys to match tokens by."""

WHISPER_ENCODER_BLOCK = BlockNames(
    attention="self_attn",
    writers=CLIP_BLOCK.writers,
    reader=CLIP_BLOCK.reader,
    head_dim="head_dim",
    mlp="",
    mlp_writers=("fc1",),
    mlp_reader="fc2",
    attend=("self_attn_layer_norm", "self_attn"),
    feed=("final_layer_norm", "fc1", "activation_fn", "fc2"),
    bookkeeping=(("num_heads", "heads"),),
    scale="scaling",
)
"""Its key Linears have no bias."""

WHISPER_DECODER_BLOCK = replace(WHISPER_ENCODER_BLOCK, attend=(), feed=(), cross="encoder_attn")
"""Between attention and feed-forward it looks at the encoder, so it is not of the shape `attend` and `feed` describe."""

LLAMA_BLOCK = BlockNames(
    attention="self_attn",
    writers=CLIP_BLOCK.writers,
    reader="self_attn.o_proj",
    head_dim="head_dim",
    mlp="mlp",
    mlp_writers=("mlp.gate_proj", "mlp.up_proj"),
    mlp_reader="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    why_rigid=ROTARY,
)
"""Llama, Mistral, Qwen 2 and 3, Gemma: grouped queries, gated MLPs; blocks are called with positions, so `attend` is empty."""

QWEN_LANGUAGE_BLOCK = replace(LLAMA_BLOCK, bookkeeping=(("num_heads", "heads"), ("num_key_value_heads", "kv_heads")))
"""The language models of Qwen2-VL and Qwen2.5-VL."""

QWEN_MIXTURE_BLOCK = replace(
    LLAMA_BLOCK,
    experts="mlp.experts",
    stacked=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    router="mlp.gate",
    top="mlp.gate.top_k",
    experts_counted=("mlp.gate.num_experts", "mlp.experts.num_experts"),
)
"""The language model of Qwen3-VL-MoE: feed-forwards, and experts in their place."""

QWEN2_VISION_BLOCK = BlockNames(
    attention="attn",
    writers=("attn.qkv",),
    reader="attn.proj",
    head_dim="head_dim",
    mlp="mlp",
    mlp_writers=("mlp.fc1",),
    mlp_reader="mlp.fc2",
    bookkeeping=(("num_heads", "heads"),),
    why_rigid=ROTARY,
)

QWEN25_VISION_BLOCK = replace(
    QWEN2_VISION_BLOCK, mlp_writers=LLAMA_BLOCK.mlp_writers, mlp_reader=LLAMA_BLOCK.mlp_reader
)

QWEN3_VISION_BLOCK = replace(QWEN2_VISION_BLOCK, mlp_writers=("mlp.linear_fc1",), mlp_reader="mlp.linear_fc2")


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _width(block: nn.Module, path: str, side: Literal["in_features", "out_features"]) -> int:
    return int(_attribute(block, f"{path}.{side}"))


def read_blocks(model: nn.Module, blocks_path: str, names: BlockNames, activation: str) -> tuple[Block, ...]:
    """Return the views of the blocks in the ModuleList at `blocks_path`, with today's widths."""
    blocks = []
    for index, block in enumerate(model.get_submodule(blocks_path).children()):
        path = f"{blocks_path}.{index}"
        experts = _experts(block, path, names)
        blocks.append(
            Block(
                path=path,
                index=index,
                attention=_attention(block, path, names, names.attention),
                mlp=None if experts else _mlp(block, path, names, activation),
                attend=names.attend,
                feed=names.feed,
                cross=_attention(block, path, names, names.cross) if names.cross else None,
                norms=tuple(f"{path}.{norm}" for norm in names.norms),
                experts=experts,
                scales=tuple(f"{path}.{scale}" for scale in names.scales),
            )
        )
    return tuple(blocks)


def _mlp(block: nn.Module, path: str, names: BlockNames, activation: str) -> Mlp:
    return Mlp(
        path=f"{path}.{names.mlp}".rstrip("."),
        writers=tuple(f"{path}.{writer}" for writer in names.mlp_writers),
        reader=f"{path}.{names.mlp_reader}",
        neurons=_width(block, names.mlp_reader, "in_features"),
        activation=activation,
    )


def _experts(block: nn.Module, path: str, names: BlockNames) -> Experts | None:
    """Return the view of a block's experts; None where it has one feed-forward for all tokens."""
    if not names.experts or names.experts not in dict(block.named_modules()):
        return None
    count, _, neurons = stacked_shape(block, names.stacked[-1])
    return Experts(
        path=f"{path}.{names.mlp}",
        router=f"{path}.{names.router}",
        stacked=tuple(f"{path}.{name}" for name in names.stacked),
        experts=count,
        top=int(_attribute(block, names.top)),
        neurons=neurons,
        bookkeeping=tuple(
            (f"{path}.{owner}", attribute)
            for owner, _, attribute in (name.rpartition(".") for name in names.experts_counted)
        ),
    )


def _attention(block: nn.Module, path: str, names: BlockNames, where: str) -> Attention:
    """Return the view of the attention at `where` in a block, which lies inside as `names.attention` does."""
    scale: tuple[tuple[str, Counts], ...] = ((names.scale, "scale"),) if names.scale else ()
    numbers = (*names.bookkeeping, (names.head_dim, "head_dim"), *scale)
    writers = tuple(where + writer.removeprefix(names.attention) for writer in names.writers)
    head_dim = int(_attribute(block.get_submodule(where), names.head_dim))
    made = [_width(block, writer, "out_features") for writer in writers]
    query, key = made[:2] if len(made) > 1 else (made[0] // 3, made[0] // 3)
    at = f"{path}.{where}"
    return Attention(
        path=at,
        writers=tuple(f"{path}.{writer}" for writer in writers),
        reader=f"{path}.{where}{names.reader.removeprefix(names.attention)}",
        heads=query // head_dim,
        kv_heads=key // head_dim,
        head_dim=head_dim,
        bookkeeping=tuple(
            (f"{at}.{owner}".rstrip("."), attribute, counts)
            for owner, _, attribute, counts in ((*name.rpartition("."), counts) for name, counts in numbers)
        ),
        per_head=tuple(f"{path}.{name}" for name in names.per_head),
        why_whole=names.why_whole,
        why_rigid=names.why_rigid or names.why_whole,
    )


def widths(blocks: tuple[Block, ...]) -> tuple[int, int] | None:
    """Return (heads, neurons) when every block has the same, and heads as wide, else None."""
    found = {(block.attention.heads, block.feeding.neurons, block.attention.head_dim) for block in blocks}
    return found.pop()[:2] if len(found) == 1 else None


def stream_width(model: nn.Module, blocks: tuple[Block, ...]) -> int:
    """Return C of the stream that the norms of `blocks` read, today."""
    return len(getattr(model.get_submodule(blocks[0].norms[0]), "weight"))  # noqa: B009


def example_pixels(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Return smooth deterministic images (B, channels, height, width) in about -2..2."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, channels, 7, 7, generator=generator)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)


def example_tokens(batch: int, length: int, vocabulary: int, last: int, padding: int = 0) -> torch.Tensor:
    """Return deterministic token ids (B, length) that end in `last`, and have it and `padding` nowhere else."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary - 1, (batch, length), generator=generator)
    ids += (ids >= last).long()  # `last` occurs at the end only
    # RoBERTa counts its positions by what is not padding.
    ids[ids == padding] = next(token for token in range(1, vocabulary) if token not in (last, padding))
    ids[:, -1] = last
    return ids


def roberta_positions(config: Any) -> int:
    """Return the most tokens of a RoBERTa: its positions count from the padding id + 1, and the table holds those before."""
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1
