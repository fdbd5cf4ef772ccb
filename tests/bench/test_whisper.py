"""Whisper out of CTranslate2's file: every parameter in its place, and the built model hears."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import assets
from bench.whisper import PARTS, read_variables, renamed
from mmcompress import checkpoint
from tests import tiny
from tests.built import built

LINEAR, NORM = ("weight", "bias"), ("gamma", "beta")


def variable(name: str, value: np.ndarray) -> bytes:
    label = name.encode() + b"\0"
    kind = {"float16": 4, "int8": 1, "float32": 0}[value.dtype.name]
    head = struct.pack("<H", len(label)) + label + struct.pack("<B", value.ndim)
    return head + struct.pack(f"<{value.ndim}IBI", *value.shape, kind, value.nbytes) + value.tobytes()


def as_ctranslate2(state: dict[str, torch.Tensor], blocks: dict[str, int]) -> dict[str, np.ndarray]:
    """Return the variables as CTranslate2 would store a Whisper of these parameters, attention joined, in half precision."""
    found: dict[str, torch.Tensor] = {}

    def put(name: str, sources: list[str], kinds: tuple[str, str]) -> None:
        weights = [state[f"{source}.weight"] for source in sources]
        # Keys have no bias.
        biases = [state.get(f"{source}.bias", torch.zeros(len(w))) for source, w in zip(sources, weights, strict=True)]
        found[f"{name}/{kinds[0]}"], found[f"{name}/{kinds[1]}"] = torch.cat(weights), torch.cat(biases)

    for side, count in blocks.items():
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", [f"model.{side}.layer_norm"], NORM)
        for index in range(count):
            for part, names in PARTS.items():
                sources = [f"model.{side}.layers.{index}.{name}" for name in names]
                if f"{sources[0]}.weight" in state:
                    put(f"{side}/layer_{index}/{part}", sources, NORM if part.endswith("norm") else LINEAR)
    for conv in ("conv1", "conv2"):
        put(f"encoder/{conv}", [f"model.encoder.{conv}"], LINEAR)
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return {name: tensor.half().numpy() for name, tensor in found.items()}


def test_every_parameter_is_read_back_from_the_joined_ones(tmp_path: Path) -> None:
    state = {name: value.detach() for name, value in tiny.bundle("whisper").model.named_parameters()}
    variables: dict[str, Any] = as_ctranslate2(state, {"encoder": 3, "decoder": 2})
    variables["encoder/num_heads"] = np.array(4, np.int8)
    body = b"".join(variable(name, value) for name, value in variables.items())
    spec = b"WhisperSpec\0"
    header = struct.pack("<IH", 6, len(spec)) + spec + struct.pack("<II", 3, len(variables))
    (tmp_path / "model.bin").write_bytes(header + body + struct.pack("<I", 0))
    read = read_variables(tmp_path / "model.bin")
    assert int(read["encoder/num_heads"]) == 4
    found = dict(renamed(read))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value.half().float()) for name, value in state.items())


@pytest.mark.real
def test_the_built_model_predicts_english() -> None:
    folder = built(assets.whisper_tiny)
    bundle = checkpoint.load(folder)
    model, tokenizer = bundle.model, bundle.processor.tokenizer
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_760_256  # as OpenAI's tiny.en
    # A second of silence: what the decoder says next is then its own English.
    silence = bundle.processor.audio(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt")
    ids = torch.tensor(
        [bundle.family.start_tokens(model) + tokenizer(" Thank you very", add_special_tokens=False)["input_ids"]]
    )  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = model(input_features=silence["input_features"], decoder_input_ids=ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " much"
