"""Where the parts of a block lie in each of transformers' block classes, relative to the block.

One `BlockNames` per block class; families say which one a tower is built of, and `anatomy` reads views out of modules by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmcompress.views import Counts


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
    turned: bool = False
    """Whether places turn queries and keys behind their Linears."""
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
    turned=True,
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
    turned=True,
)

QWEN25_VISION_BLOCK = replace(
    QWEN2_VISION_BLOCK, mlp_writers=LLAMA_BLOCK.mlp_writers, mlp_reader=LLAMA_BLOCK.mlp_reader
)

QWEN3_VISION_BLOCK = replace(QWEN2_VISION_BLOCK, mlp_writers=("mlp.linear_fc1",), mlp_reader="mlp.linear_fc2")
