"""LayoutLMv3: one encoder over the words of a page, where they stand, and the patches of its picture.

Shape alphabet: B batch, T text tokens, N patches with their class token, C channels, V labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LayoutLMv3ForSequenceClassification, LayoutLMv3ForTokenClassification, LayoutLMv3Model

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import example_pixels, example_tokens, read_blocks, roberta_positions, widths
from mmcompress.families.answers import next_token_roots, roots
from mmcompress.families.block_names import BERT_BLOCK
from mmcompress.families.layoutlm_parts import Distances, distances, joint_part, states
from mmcompress.families.two_tower import in_dtype_of, tokenizer_of
from mmcompress.parts import Part
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.data import Sample

CLASSES: dict[str, Any] = {
    made.__name__: made
    for made in (LayoutLMv3Model, LayoutLMv3ForSequenceClassification, LayoutLMv3ForTokenClassification)
}
PAGE = 1000
"""Boxes are given in thousandths of the page's width and height."""
WORDS_A_LINE = 8


class LayoutLm:
    """LayoutLMv3, plain or classifying pages or words.

    Samples hold no boxes, and no OCR engine is called: the words of a sample's first text are laid out over the page in reading
    order, `WORDS_A_LINE` to a line. That is good enough to calibrate on, and no substitute for the real places.
    """

    name = "layoutlm"
    model_types: tuple[str, ...] = ("layoutlmv3",)
    architectures: tuple[str, ...] = tuple(CLASSES)

    def model_class(self, config: Any) -> type[nn.Module]:
        if not (config.text_embed and config.visual_embed):
            raise UsageError(
                "LayoutLMv3 of pictures or of words alone is not supported", hint="use a checkpoint that takes both"
            )
        found: type[nn.Module] = CLASSES[(config.architectures or ["LayoutLMv3Model"])[0]]
        return found

    def towers(self, model: Any) -> tuple[Tower, ...]:
        plain = isinstance(model, LayoutLMv3Model)
        at, c = "" if plain else "layoutlmv3.", model.config
        tables = ("word", "token_type", "position", "x_position", "y_position", "h_position", "w_position")
        biases = (
            *(("rel_pos_bias",) if c.has_relative_attention_bias else ()),
            *(("rel_pos_x_bias", "rel_pos_y_bias") if c.has_spatial_attention_bias else ()),
        )
        why = "its biases of relative positions have a column a head, which all blocks share" if biases else ""
        blocks = f"{at}encoder.layer"
        return (
            Tower(
                name="joint",
                path="encoder" if plain else "layoutlmv3",
                blocks_path=blocks,
                blocks=read_blocks(model, blocks, replace(BERT_BLOCK, why_whole=why), c.hidden_act),
                config="",
                depth_key="num_hidden_layers",
                heads=("embeddings", "patch_embed", "LayerNorm", "norm") if plain else ("classifier",),
                parameters=("cls_token", "pos_embed") if plain else (),
                embeddings=(*(f"{at}embeddings.{table}_embeddings" for table in tables), f"{at}patch_embed.proj"),
                uncalled=tuple(f"{at}encoder.{bias}" for bias in biases),
                why_no_stream="words and patches share a row, and what is said of a word is read at its place",
            ),
        )

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return one row per sample whose cosine between two models is how alike they are; see `Family.encode`.

        - of the plain model the states of the words (B, T, C) as (B, T * C), zero at padding;
        - of pages sqrt(p) of the distribution p over labels (B, V); of words those of each, as (B, T * V), zero at padding.
        """
        inputs, text = in_dtype_of(model, inputs), inputs["input_ids"].shape[1]
        mask = inputs["attention_mask"][:, :text]
        known = distances(getattr(model, "layoutlmv3", model))
        made = self.said(model, known, inputs["input_ids"], inputs["bbox"], mask, inputs["pixel_values"])
        if isinstance(model, LayoutLMv3Model):
            return (made[:, :text] * mask[:, :, None]).flatten(1)
        return roots(made) if isinstance(model, LayoutLMv3ForSequenceClassification) else next_token_roots(made, mask)

    @staticmethod
    def said(model: Any, known: Distances, ids: Tensor, boxes: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """Return what the model itself gives: states (B, T + N, C), or logits (B, V) of pages, (B, T, V) of words."""
        base = getattr(model, "layoutlmv3", model)
        made = states(base, known, ids, boxes, mask, pixels)
        if base is model:
            return made
        pages = isinstance(model, LayoutLMv3ForSequenceClassification)
        logits: Tensor = model.classifier(made[:, 0] if pages else made[:, : ids.shape[1]])
        return logits

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the one graph, whose mask is that of the words alone."""

        def example(batch: int, tokens: int) -> dict[str, Tensor]:
            return self._example(model, batch, tokens) | {"attention_mask": torch.ones(batch, tokens, dtype=torch.long)}

        known = distances(getattr(model, "layoutlmv3", model))

        def compute(model: Any, *given: Tensor) -> Tensor:
            return self.said(model, known, *given)

        output = "last_hidden_state" if isinstance(model, LayoutLMv3Model) else "logits"
        return (joint_part(model, output, compute, example, known, roberta_positions(model.config)),)

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return the sample itself where it has a picture and a text; see `Family.items`."""
        return [sample] if sample.shown and sample.texts else []

    def prepare(self, model: Any, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return input_ids (B, T), bbox (B, T, 4), pixel_values, and attention_mask (B, T + N) of all the encoder sees.

        A page with more words than the model takes is cut. Raises UsageError where an image processor, a tokenizer that takes boxes
        or a text is missing.
        """
        if processor.image is None:
            raise UsageError("this checkpoint has no image processor", hint="add its preprocessor_config.json")
        for sample in items:
            if not sample.texts:
                raise UsageError(f"sample '{sample.key}' has no words", hint="give each page its words as a text")
        words = [sample.texts[0].split() for sample in items]
        tokenizer = tokenizer_of(processor)
        if "boxes" not in getattr(type(tokenizer).__call__, "__annotations__", {}):
            raise UsageError(
                f"a {type(tokenizer).__name__} does not take the places of words", hint="use LayoutLMv3's own tokenizer"
            )
        made = tokenizer(
            words,
            boxes=[reading_order(len(page)) for page in words],
            padding=True,
            truncation=True,
            max_length=roberta_positions(model.config),
            return_tensors="pt",
        )
        pixels = processor.image(images=[sample.image for sample in items], apply_ocr=False, return_tensors="pt")[
            "pixel_values"
        ]
        mask = self._whole(model, made["attention_mask"])
        given = {"input_ids": made["input_ids"], "bbox": made["bbox"], "pixel_values": pixels, "attention_mask": mask}
        return in_dtype_of(model, given)

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth pictures, and 16 tokens in reading order."""
        return self._example(model, batch, min(16, roberta_positions(model.config)))

    def _example(self, model: Any, batch: int, tokens: int) -> dict[str, Tensor]:
        c = model.config
        ids = example_tokens(batch, tokens, c.vocab_size, c.eos_token_id, c.pad_token_id)
        boxes = torch.tensor(reading_order(ids.shape[1])).expand(batch, -1, -1).contiguous()
        return {
            "input_ids": ids,
            "bbox": boxes,
            "pixel_values": example_pixels(batch, c.num_channels, c.input_size, c.input_size),
            "attention_mask": self._whole(model, torch.ones_like(ids)),
        }

    def exporting(self, model: nn.Module) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def write_config(self, model: Any) -> None:
        """Write depth and MLP width; heads cannot be written (the head size would change)."""
        (tower,) = self.towers(model)
        model.config.num_hidden_layers = len(tower.blocks)
        found = widths(tower.blocks)
        if found:
            model.config.intermediate_size = found[1]

    def _whole(self, model: Any, text: Tensor) -> Tensor:
        """Return the mask of words, class token and patches (B, T + N)."""
        patches = (model.config.input_size // model.config.patch_size) ** 2 + 1
        return torch.cat([text, text.new_ones(len(text), patches)], dim=1)


def reading_order(words: int) -> list[list[int]]:
    """Return a box (left, top, right, bottom) in 0..PAGE for each of `words` words, line by line."""
    lines = max(1, -(-words // WORDS_A_LINE))
    wide, high = PAGE // WORDS_A_LINE, PAGE // lines
    found = []
    for word in range(words):
        left, top = word % WORDS_A_LINE * wide, word // WORDS_A_LINE * high
        found.append([left, top, left + wide, top + high])
    return found


FAMILY = LayoutLm()
