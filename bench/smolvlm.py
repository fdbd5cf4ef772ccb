"""A SmolVLM-256M whose language model is real and whose eyes are random: SmolLM2-135M in SmolVLMForConditionalGeneration.

The words are SmolLM2-135M-Instruct's (Apache-2.0), out of a 4-bit GGUF: what its rounding cost is not ours to measure, so its
dequantized weights are *the* original here. The vision encoder has the sizes of SmolVLM-256M's (SigLIP base, 12 blocks, patches of
16 pixels) and random weights of a fixed seed; so has the connector, which nobody trained. So what it says to a text can be judged
(perplexity); what it says to a picture means nothing but is the same every time, which is enough to compare engines and to time
stages. Pictures are not cut into tiles and have 256 pixels a side, not 512: 16 tokens each, at a fifth of the work.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from bench.mini_vlm import CONTENT

SIDE, PATCH, FOLDED = 256, 16, 4
"""Pixels of a picture and of a patch; 4 x 4 patches become one image token."""
GRID = 6
"""The tokenizer knows rows and columns of tiles up to this many."""
AROUND, IMAGE, WHOLE, END = "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"
LONGEST_ANSWER = 24

CHAT_TEMPLATE = (
    """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
"""
    + CONTENT
    + """\
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)
"""SmolLM2's own, where the content of a message may also be a list of parts with a picture among them."""

READ_GGUF = """
import json, sys
import gguf, numpy
from safetensors.numpy import save_file
source, out = sys.argv[1:]
reader = gguf.GGUFReader(source)
tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(numpy.float32) for t in reader.tensors}
facts = {name: json.dumps(field.contents()) for name, field in reader.fields.items()}
save_file(tensors, out, facts)
"""

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3
"""The type of a token in GGUF that is never cut out of text."""


def read_gguf(file: Path, reader: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Dequantized float32 tensors and the facts of a GGUF file, by their names there.

    `reader` is a folder that holds the package gguf, which only a process of its own imports. Raises RuntimeError when that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "read.safetensors"
        script = f"import sys; sys.path.insert(0, {str(reader)!r})\n{READ_GGUF}"
        done = subprocess.run(
            [sys.executable, "-c", script, str(file), str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"gguf failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        with safe_open(out, "pt") as stored:
            facts = {name: json.loads(value) for name, value in stored.metadata().items()}
            return {name: stored.get_tensor(name) for name in stored.offset_keys()}, facts


def language_config(facts: dict[str, Any], vocabulary: int) -> LlamaConfig:
    """SmolLM2's sizes: 30 blocks, 576 wide, 9 heads over 3 of keys and values."""
    own = {name.removeprefix("llama."): value for name, value in facts.items() if name.startswith("llama.")}
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=own["embedding_length"],
        intermediate_size=own["feed_forward_length"],
        num_hidden_layers=own["block_count"],
        num_attention_heads=own["attention.head_count"],
        num_key_value_heads=own["attention.head_count_kv"],
        head_dim=own["rope.dimension_count"],
        max_position_embeddings=own["context_length"],
        rms_norm_eps=own["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": own["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
    )


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key weight (heads * D, C) as transformers rotates them.

    GGUF has the two numbers that are rotated together beside each other, transformers D/2 apart.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def language_weights(tensors: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """SmolLM2's tensors under the names of a Llama decoder, without those of image tokens."""
    made = {"embed_tokens.weight": tensors["token_embd.weight"], "norm.weight": tensors["output_norm.weight"]}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in BLOCK.items():
            found = tensors[f"blk.{layer}.{theirs}.weight"]
            made[f"layers.{layer}.{ours}.weight"] = halves_apart(found, heads[theirs]) if theirs in heads else found
    return made


def tokenizer_of(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE, digits one by one, and behind its words SmolVLM's tokens around and in place of pictures."""
    words, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, GRID + 1) for column in range(1, GRID + 1)]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    special += [WHOLE, *tiles, AROUND, IMAGE, END]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=words[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=words[facts["tokenizer.ggml.eos_token_id"]],
        pad_token=words[facts["tokenizer.ggml.padding_token_id"]],
        extra_special_tokens={"image_token": IMAGE, "fake_image_token": AROUND, "global_image_token": WHOLE},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=facts["llama.context_length"],
        model_input_names=["input_ids", "attention_mask"],
    )


def assembled(
    language: LlamaConfig, weights: dict[str, Tensor], image_token: int, vision: dict[str, Any]
) -> SmolVLMForConditionalGeneration:
    """The model around `weights`; everything else is drawn with a fixed seed.

    Rows of tokens that SmolLM2 has no word for are the mean of its rows: they are no likelier an answer than a mean word. Image
    tokens come out as large as words.
    """
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=image_token,
        scale_factor=FOLDED,
        tie_word_embeddings=True,
        pad_token_id=language.pad_token_id,
    )
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(config).eval()
    table = weights["embed_tokens.weight"]
    added = table.mean(0, keepdim=True).expand(language.vocab_size - len(table), -1)
    model.model.text_model.load_state_dict(weights | {"embed_tokens.weight": torch.cat([table, added])}, strict=True)
    projection = model.model.connector.modality_projection.proj.weight
    with torch.no_grad():
        projection.normal_(std=float(table.std()) / math.sqrt(projection.shape[1]))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=LONGEST_ANSWER,
        bos_token_id=language.bos_token_id,
        eos_token_id=language.eos_token_id,
        pad_token_id=language.pad_token_id,
    )
    return model


def image_processor() -> SmolVLMImageProcessorPil:
    """Each picture as a whole, in a square."""
    return SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )


def build_smolvlm(file: Path, reader: Path, out: Path) -> None:
    """Writes the SmolVLMForConditionalGeneration folder to `out`, weights in float16.

    Raises RuntimeError when the GGUF file cannot be read or holds another model.
    """
    tensors, facts = read_gguf(file, reader)
    tokenizer = tokenizer_of(facts)
    language = language_config(facts, len(tokenizer))
    vision = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": 768, "intermediate_size": 3072}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    model = assembled(language, language_weights(tensors, language), image_token, vision)
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    image_processor().save_pretrained(out)
