"""Small random models whose texts look at pictures inside the encoder, with real processors."""

from __future__ import annotations

import string
from typing import Any

import torch
from transformers import (
    BlipConfig,
    BlipImageProcessorPil,
    LayoutLMv3Config,
    LayoutLMv3ImageProcessorPil,
    LayoutLMv3Tokenizer,
    ViltConfig,
    ViltImageProcessorPil,
)

SIDE = 56
ARCHITECTURES = {
    "blip": "BlipForConditionalGeneration",
    "blip_vqa": "BlipForQuestionAnswering",
    "blip_retrieval": "BlipForImageTextRetrieval",
    "vilt": "ViltForQuestionAnswering",
    "vilt_retrieval": "ViltForImageAndTextRetrieval",
    "layoutlm": "LayoutLMv3Model",
    "layoutlm_pages": "LayoutLMv3ForSequenceClassification",
    "layoutlm_words": "LayoutLMv3ForTokenClassification",
}
ASKED = ("blip_vqa", "vilt")
"""Those that are asked something about every picture."""


def named(name: str) -> list[str]:
    """Return what config.json says of the class, where a model type has several."""
    return [ARCHITECTURES[name]] if name in ARCHITECTURES else []


def parts(name: str) -> tuple[Any, Any]:
    """Return config and image processor of the model `name`; its words are those of `tiny.tokenizer`."""
    if name.startswith("layoutlm"):
        return _layoutlm(name), LayoutLMv3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, apply_ocr=False)
    if name.startswith("vilt"):
        return _vilt(), ViltImageProcessorPil(size={"shortest_edge": SIDE}, size_divisor=8)
    return _blip(), BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def strengthen(model: torch.nn.Module, name: str) -> None:
    """Let the answer depend on what is looked at, as a trained model's does."""
    parts = {
        "blip": ("crossattention.output.dense.weight", "self.value.weight", "patch_embedding.weight"),
        "vilt": ("attention.output.dense.weight", "attention.value.weight", "patch_embeddings.projection.weight"),
    }
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if name in ARCHITECTURES and path.endswith(parts.get(name.removesuffix("_vqa"), ())):
                parameter.mul_(9)


def words(name: str) -> Any:
    """Return the tokenizer of the model `name`, None where it is that of `tiny.tokenizer`."""
    if not name.startswith("layoutlm"):
        return None
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: number for number, token in enumerate([*marks, "Ġ", *string.ascii_lowercase])}
    return LayoutLMv3Tokenizer(vocab=vocabulary, merges=[])


def _layoutlm(name: str) -> Any:
    return LayoutLMv3Config(
        architectures=[ARCHITECTURES[name]],
        vocab_size=32,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=64,
        coordinate_size=8,
        shape_size=8,
        rel_pos_bins=8,
        rel_2d_pos_bins=8,
        input_size=SIDE,
        patch_size=8,
        id2label={number: f"label {number}" for number in range(5)},
    )


def _vilt() -> Any:
    return ViltConfig(
        vocab_size=24,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=20,
        image_size=SIDE,
        patch_size=8,
        pad_token_id=0,
        id2label={number: f"answer {number}" for number in range(12)},
    )


def _blip() -> Any:
    # Released models start their vision weights at 1e-10 and say 0.02 nowhere.
    vision = {"image_size": SIDE, "patch_size": 8, "num_hidden_layers": 3, "initializer_range": 0.02}
    text = {"vocab_size": 24, "max_position_embeddings": 24, "num_hidden_layers": 2, "bos_token_id": 1}
    ends = {"eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    width = {"hidden_size": 48, "intermediate_size": 128, "num_attention_heads": 4}
    return BlipConfig(
        vision_config={**vision, **width}, text_config={**text, **ends, **width}, image_text_hidden_size=24
    )
