"""BLIP: a ViT beside a BERT that can look at what the ViT saw; it captions, or answers questions.

Shape alphabet: B batch, N image tokens, T text tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import read_blocks, widths
from mmcompress.families.answers import FORCED_TOKENS, greedy, next_token_roots, quiet
from mmcompress.families.blip_parts import answerer_parts, captioner_parts, decoding, masked_cross_attention
from mmcompress.families.blip_views import (
    example_ids,
    example_pictures,
    example_states,
    lined_up,
    pixels,
    text_tower,
    vision_tower,
    write_widths,
)
from mmcompress.families.block_names import BLIP_DECODER_BLOCK
from mmcompress.families.two_tower import tokenizer_of
from mmcompress.parts import Decoding, Part
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.data import Sample

ANSWER_TOKENS = 32
"""The longest caption or answer, where the generation config names no other."""


class BlipCaptioner:
    """BlipForConditionalGeneration.

    Its towers are "vision", whose output are the states of all image tokens, and "decoder", which predicts the caption's next token
    from them. The decoder is judged by itself: the states go in without gradient, or ready-made where inputs hold them.
    """

    name = "blip"
    model_types: tuple[str, ...] = ("blip",)
    architectures: tuple[str, ...] = ("BlipForConditionalGeneration",)
    answering = "decoder"

    def model_class(self, config: Any) -> type[nn.Module]:
        return BlipForConditionalGeneration

    def towers(self, model: Any) -> tuple[Tower, ...]:
        seen = "BLIP's text decoder looks at every token of the picture, in its place"
        return replace(vision_tower(model), why_no_stream=seen), self.decoder(model)

    def decoder(self, model: Any) -> Tower:
        """Return the view of the text decoder."""
        text, path = model.config.text_config, "text_decoder.bert"
        tied = (f"{path}.embeddings.word_embeddings", "text_decoder.cls.predictions.decoder")
        return Tower(
            name="decoder",
            path="text_decoder",
            blocks_path=f"{path}.encoder.layer",
            blocks=read_blocks(model, f"{path}.encoder.layer", BLIP_DECODER_BLOCK, text.hidden_act),
            config="text_config",
            depth_key="num_hidden_layers",
            heads=("text_decoder.cls",),
            embeddings=(f"{path}.embeddings.word_embeddings", f"{path}.embeddings.position_embeddings"),
            tied=(tied,) if model.config.tie_word_embeddings else (),
            why_no_stream="the decoder writes one token after the other, and each is needed",
        )

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return one row per sample whose cosine between two models is how alike they are; see `Family.encode`.

        - "vision": the states of the image tokens (B, N, C) as (B, N * C).
        - "decoder", led through the reference: its next-token distributions, see `next_token_roots`.
        """
        if tower == "vision":
            return self.seen(model, inputs).flatten(1)
        # Padding lies behind the text, where a causal decoder does not look: it needs no mask inside.
        given = self.looked_at(model, inputs)
        with masked_cross_attention(model):
            logits = model.text_decoder(inputs["decoder_input_ids"], use_cache=False, **given).logits
        return next_token_roots(logits, inputs["decoder_mask"])

    def seen(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return the states of the image tokens (B, N, C)."""
        states: Tensor = model.vision_model(inputs["pixel_values"]).last_hidden_state
        return states

    def looked_at(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the decoder's cross-attention is given, without gradient."""
        if "encoder_hidden_states" in inputs:
            return {"encoder_hidden_states": inputs["encoder_hidden_states"]}
        with torch.no_grad():
            return {"encoder_hidden_states": self.seen(model, inputs)}

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return the sample itself where it has a picture and, for the decoder, a caption; see `Family.items`."""
        return [sample] if sample.shown and (tower == "vision" or sample.texts) else []

    def prepare(self, model: Any, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return pixel_values of samples, for the decoder also ids and mask (B, T) of what it is led through.

        That is the sample's first text, cut at `FORCED_TOKENS`. Raises UsageError where an image processor or a tokenizer is
        missing, and for what the model cannot be asked.
        """
        inputs = self.given(model, processor, items) if tower != "vision" else pixels(model, processor, items)
        return {**inputs, **_led(model, processor, items)} if tower == "decoder" else inputs

    def next_tokens(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return (B, T): the text's next token at each place, the end after its last; -1 at padding.

        What comes after `FORCED_TOKENS` tokens is -1 too: more of the text may have been cut off.
        """
        ids, counts = inputs["decoder_input_ids"], inputs["decoder_mask"].sum(1, keepdim=True)
        place = torch.arange(ids.shape[1], device=ids.device)
        tokens = torch.where(place == counts - 1, model.config.text_config.sep_token_id, ids.roll(-1, 1))
        cut = (place == counts - 1) & (counts > _forced_limit(model))
        return tokens.masked_fill((place >= counts) | cut, -1)

    def given(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return what an answer depends on: the picture. Raises UsageError for samples with a question."""
        for sample in samples:
            if sample.question:
                raise UsageError(
                    f"sample '{sample.key}' asks a question, and {self.architectures[0]} only captions",
                    hint="use a BlipForQuestionAnswering checkpoint",
                )
        return pixels(model, processor, samples)

    def generate(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> list[str]:
        """Return the greedy caption of (or answer to) each sample. Raises what `prepare` raises."""
        inputs = {name: value.to(model.device) for name, value in self.given(model, processor, samples).items()}
        text = model.config.text_config
        start, given = torch.full((len(samples), 1), text.bos_token_id), self.looked_at(model, inputs)
        with quiet(), masked_cross_attention(model):
            ids = model.text_decoder.generate(
                input_ids=start.to(model.device),
                eos_token_id=text.sep_token_id,
                pad_token_id=text.pad_token_id,
                generation_config=greedy(model.generation_config, _answer_limit(model)),
                **given,
            )
        return self.texts(model, processor, ids[:, 1:].tolist())

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the graphs that look and write."""
        return captioner_parts(model)

    def decoding(self, model: Any) -> Decoding:
        return replace(decoding(model, _answer_limit(model)), questions=False)

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return self.given(model, processor, samples)

    def texts(self, model: Any, processor: Processor, ids: Sequence[Sequence[int]]) -> list[str]:
        found = tokenizer_of(processor).batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth pictures for the vision tower; for the decoder states as the vision tower gives them, and 16 tokens."""
        if tower == "vision":
            return example_pictures(model, batch)
        c = model.config.text_config
        ids = example_ids(model, batch)
        ids[:, 0] = c.bos_token_id
        return {
            "encoder_hidden_states": example_states(model, batch),
            "decoder_input_ids": ids,
            "decoder_mask": torch.ones_like(ids),
        }

    def exporting(self, model: nn.Module) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def write_config(self, model: Any) -> None:
        """Write depth and MLP width of the towers; heads cannot be written (the head size would change)."""
        write_widths(model, self.towers(model))


class BlipAnswerer(BlipCaptioner):
    """BlipForQuestionAnswering: between both, the tower "text" reads the question, looking at the picture.

    config.json has one depth and one MLP width for question encoder and answer decoder.
    """

    name = "blip_vqa"
    architectures: tuple[str, ...] = ("BlipForQuestionAnswering",)

    def model_class(self, config: Any) -> type[nn.Module]:
        return BlipForQuestionAnswering

    def towers(self, model: Any) -> tuple[Tower, ...]:
        vision, decoder = super().towers(model)
        shared = "config.json has one depth for the question encoder and the answer decoder"
        text = replace(
            text_tower(model, BLIP_DECODER_BLOCK),
            why_fixed_depth=shared,
            why_no_stream="the answer decoder looks at every token of the question, in its place",
        )
        return vision, text, replace(decoder, why_fixed_depth=shared)

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return rows as the captioner's; of "text" the states of the question (B, T, C), zero at padding, as (B, T * C)."""
        if tower != "text":
            return super().encode(model, tower, inputs)
        return (self.read(model, inputs) * inputs["attention_mask"][:, :, None]).flatten(1)

    def read(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return the states of the question (B, T, C), which the picture's went into without gradient."""
        states: Tensor = model.text_encoder(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], **super().looked_at(model, inputs)
        ).last_hidden_state
        return states

    def looked_at(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the question's states and mask, which the decoder's cross-attention is given, without gradient."""
        mask = {"encoder_attention_mask": inputs["attention_mask"]}
        if "encoder_hidden_states" in inputs:
            return {"encoder_hidden_states": inputs["encoder_hidden_states"], **mask}
        with torch.no_grad():
            return {"encoder_hidden_states": self.read(model, inputs), **mask}

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return the sample itself where it has a picture, a question and, for the decoder, an answer; see `Family.items`."""
        asked = tower == "vision" or sample.question
        return super().items("decoder" if tower == "decoder" else "vision", sample) if asked else []

    def given(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the picture and the question, ids and mask (B, T).

        Raises UsageError for samples without a question, and for questions longer than the model takes.
        """
        limit = model.config.text_config.max_position_embeddings
        rows = [tokenizer_of(processor)(sample.question)["input_ids"] for sample in samples]
        for row, sample in zip(rows, samples, strict=True):
            if not sample.question:
                raise UsageError(
                    f"sample '{sample.key}' asks nothing, and {self.architectures[0]} answers questions",
                    hint="use data with questions, or a BlipForConditionalGeneration checkpoint for captions",
                )
            if len(row) > limit:
                raise UsageError(
                    f"the question of sample '{sample.key}' has {len(row)} tokens; {self.name} takes {limit}",
                    hint="ask a shorter question",
                )
        ids, mask = lined_up(rows, model.config.text_config.pad_token_id)
        return {**pixels(model, processor, samples), "input_ids": ids, "attention_mask": mask}

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the graphs that look, read and write."""
        return answerer_parts(model)

    def decoding(self, model: Any) -> Decoding:
        return decoding(model, _answer_limit(model))

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        names = {"input_ids": "question_ids", "attention_mask": "question_mask"}
        return {names.get(name, name): value for name, value in self.given(model, processor, samples).items()}

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return inputs as the captioner's; of "text" a question and states as the vision tower gives them."""
        ids = example_ids(model, batch)
        mask = torch.ones_like(ids)
        if tower == "text":
            return {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": example_states(model, batch)}
        inputs = super().example_inputs(model, tower, batch)
        if tower == "decoder":
            # The question's states have the picture's width.
            states = inputs["encoder_hidden_states"][:, : ids.shape[1]]
            inputs |= {
                "encoder_hidden_states": states,
                "attention_mask": torch.ones(states.shape[:2], dtype=torch.long),
            }
        return inputs

    def write_config(self, model: Any) -> None:
        """Write depth and MLP width of the vision tower, and the width of both others where they have one."""
        vision, text, decoder = self.towers(model)
        write_widths(model, (vision,))
        found = widths(text.blocks + decoder.blocks)
        if found:
            model.config.text_config.intermediate_size = found[1]


def _led(model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return ids and mask (B, T) of the samples' first texts behind the start token."""
    text, limit = model.config.text_config, _forced_limit(model)
    answers = tokenizer_of(processor)([sample.texts[0] for sample in samples], add_special_tokens=False)["input_ids"]
    ids, mask = lined_up([[text.bos_token_id, *answer[:limit]] for answer in answers], text.pad_token_id)
    return {"decoder_input_ids": ids, "decoder_mask": mask}


def _answer_limit(model: Any) -> int:
    return min(ANSWER_TOKENS, int(model.config.text_config.max_position_embeddings) - 1)


def _forced_limit(model: Any) -> int:
    return min(FORCED_TOKENS, int(model.config.text_config.max_position_embeddings) - 1)


CAPTIONER, ANSWERER = BlipCaptioner(), BlipAnswerer()
