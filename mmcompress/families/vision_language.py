"""What models share that look at a picture and answer in text: a vision encoder, a connector, a language model.

Its towers are "vision", whose output are the image tokens the language model is given (its `heads` are the connector), and
"language", which predicts the answer's tokens. The language tower is judged by itself: the image tokens go in without gradient, or
ready-made where inputs hold them.

All inputs are batch first, one row a sample; what a model wants packed is packed by `seen`.

Shape alphabet: B batch, N tokens, T answer tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.answers import FORCED_TOKENS, greedy, next_token_roots, quiet
from mmcompress.families.language_models import language_tower, require_language, write_language_config
from mmcompress.families.picture_rows import gathered, padded, spread
from mmcompress.families.talk import Shown, Talk, require_no_tokens
from mmcompress.families.vision_language_parts import embed_part, language_decoding, language_part
from mmcompress.parts import Decoding, Part
from mmcompress.views import Tower

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.data import Sample

ANSWER_TOKENS = 128
"""The longest answer, where the generation config names no other."""


class VisionLanguage(ABC):
    """Base of these families; a family adds names, classes, the vision tower, and how pictures become inputs and placeholders."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    language = "model.language_model"
    """Path of the language model."""
    image_keys: tuple[str, ...] = ("pixel_values",)
    """The inputs that are made of a picture."""
    talk = Talk()
    answering = "language"
    both_ways = False
    """Whether the prompt's tokens look at one another in both directions."""
    position_axes = 1
    """How many positions a token has."""

    @abstractmethod
    def vision_tower(self, model: Any) -> Tower:
        """Return the view of the vision encoder with its connector."""

    @abstractmethod
    def image_inputs(self, model: Any, processor: Processor, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return the inputs made of pictures, one row each."""

    @abstractmethod
    def example_images(self, model: Any, batch: int) -> dict[str, Tensor]:
        """Return what `image_inputs` could, the same every time."""

    @abstractmethod
    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        """Return the text that stands for picture `row`: its image token as often as the picture has tokens."""

    @abstractmethod
    def example_image_tokens(self, model: Any) -> int:
        """Return how many tokens an example picture has."""

    def seen(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        """Return what the model makes of the pictures: an output whose `pooler_output` lists (N, C) of each."""
        return model.get_image_features(**inputs, return_dict=True)

    def positions(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the language model is told of the tokens' places and kinds beside their mask."""
        return {}

    def marks(
        self, model: Any, ids: Tensor, mask: Tensor, prompt: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return further inputs of the language model, (B, …), from token ids and masks (B, N); `prompt` is 1 at what was asked."""
        return {}

    def towers(self, model: Any) -> tuple[Tower, ...]:
        return self.vision_tower(model), language_tower(model, self.language)

    def check_config(self, config: Any) -> None:
        """Raise UsageError where the language model is none of those known."""
        require_language(self.name, config.text_config.model_type)

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return one row per sample whose cosine between two models is how alike they are; see `Family.encode`.

        - "vision": the image tokens (N, C) that the language model is given, as N * C, zeros behind where others have more.
        - "language", led through the reference answer: its next-token distributions, see `next_token_roots`.
        """
        if tower == "vision":
            return padded([tokens.flatten() for tokens in self.image_tokens(model, inputs)])
        hidden = model.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs=self._given(model, inputs),
            use_cache=False,
            **self.positions(model, inputs),
        ).last_hidden_state
        places = inputs["answer_positions"][:, :, None].expand(-1, -1, hidden.shape[-1])
        return next_token_roots(model.lm_head(hidden.gather(1, places)), inputs["answer_mask"])

    def image_tokens(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return all that the language model is given of each picture, (N, C) each."""
        return list(self.seen(model, inputs).pooler_output)

    def ready_made(self, model: Any, tokens: Tensor) -> Any:
        """Return image tokens (B, N, C) as the output `seen` gives."""
        return BaseModelOutputWithPooling(pooler_output=list(tokens))  # type: ignore[arg-type]

    def _given(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any] | None:
        if "image_tokens" in inputs:
            return {"image": self.ready_made(model, inputs["image_tokens"])}
        images = {key: inputs[key] for key in self.image_keys if key in inputs}
        if not images:
            return None
        if "image_counts" in inputs:
            images = {key: gathered(value, inputs["image_counts"]) for key, value in images.items()}
        if not len(next(iter(images.values()))):
            return None
        with torch.no_grad():
            return self.made_of(model, images)

    def made_of(self, model: Any, images: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the model makes of pictures, one row each, by its kind, as the model's forward takes it."""
        return {"image": self.seen(model, images)}

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return each of a sample's pictures as a sample or, for the language model, the sample where it has an answer.

        See `Family.items`.
        """
        if tower != "vision":
            return [sample] if sample.texts else []
        return sample.one_by_one()

    def visuals(self, sample: Sample) -> list[Any]:
        """Return all that a sample shows, decoded, as `image_inputs` takes it: here images, and frames of a video as images.

        Raises what decoding raises.
        """
        return [one.picture for one in sample.decoded().one_by_one()]

    def prepare(self, model: Any, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return the inputs made of samples' pictures and, for the language model, of question and answer in its chat template.

        input_ids and attention_mask (B, N); answer_positions and answer_mask (B, T): the places that each predict a token of the
        first accepted answer, cut at `FORCED_TOKENS`. Raises UsageError where a picture, an image processor, a tokenizer or an
        image token is missing, and for a talk longer than the model takes.
        """
        if tower == "vision":
            made = self._images(model, processor, [one for sample in items for one in self.visuals(sample)])
            return {key: made[key] for key in self.image_keys if key in made}
        images, prompts = self._asked(model, processor, items)
        tokenizer, tokens = self.talk.tokenizer(processor), self.image_tokens_of(model, processor)
        for sample in items:
            require_no_tokens(sample, sample.texts[:1], tokens)
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        answers = [
            (tokenizer(sample.texts[0], add_special_tokens=False)["input_ids"] + end)[:FORCED_TOKENS]
            for sample in items
        ]
        ids, mask = self._row_up(model, [p + a for p, a in zip(prompts, answers, strict=True)], items, left=False)
        counts = torch.tensor([len(answer) for answer in answers])
        places = torch.arange(int(counts.max()))
        first = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
        # Behind the answer its last place stands again: a token like the others, and masked.
        positions = first + torch.minimum(places, counts[:, None] - 1)
        prompt = (torch.arange(ids.shape[1]) <= first).long()
        return {
            **images,
            "input_ids": ids,
            "attention_mask": mask,
            "answer_positions": positions,
            "answer_mask": (places < counts[:, None]).long(),
            **self.marks(model, ids, mask, prompt, images),
        }

    def next_tokens(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return (B, T): the answer's tokens and its end, -1 behind; see `TeacherForced.next_tokens`."""
        following = inputs["input_ids"].roll(-1, 1).gather(1, inputs["answer_positions"])
        return following.masked_fill(~inputs["answer_mask"].bool(), -1)

    def generate(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> list[str]:
        """Return the greedy answer to each sample's question; to none, a description. Raises what `prepare` raises."""
        images, prompts = self._asked(model, processor, samples)
        ids, mask = self._row_up(model, prompts, samples, left=True)
        marks = self.marks(model, ids, mask, mask, images)
        given = {"input_ids": ids, "attention_mask": mask, **images, **marks}
        given = {name: value.to(model.device) for name, value in given.items()}
        with quiet():
            made = model.generate(
                **self.generation_inputs(model, given), generation_config=greedy(model.generation_config, ANSWER_TOKENS)
            )
        return self.texts(model, processor, made[:, ids.shape[1] :].tolist())

    def generation_inputs(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return batch-first inputs as the model's own `generate` takes them."""
        counts = inputs.pop("image_counts", None)
        if counts is not None:
            inputs |= {key: gathered(inputs[key], counts) for key in self.image_keys if key in inputs}
        return inputs

    @abstractmethod
    def vision_graph(self, model: Any) -> Part:
        """Return the part that makes image_embeds (R, N, C) of what `looked_at` gives, for any R.

        Raises UsageError for models whose pictures no graph can take.
        """

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the graphs that look, look words up, and write. Raises what `vision_graph` raises."""
        return (
            self.vision_graph(model),
            embed_part(model, self.deep(model)),
            language_part(model, self.language, self.both_ways, self.position_axes, self.deep(model)),
        )

    def decoding(self, model: Any) -> Decoding:
        return language_decoding(model, ANSWER_TOKENS)

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the vision part's inputs, of pictures only, and the prompt: input_ids, attention_mask, position_ids."""
        images, prompts = self._asked(model, processor, samples)
        ids, mask = self._row_up(model, prompts, samples, left=True)
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        marks = self.marks(model, ids, mask, mask, images)
        counts = images.pop("image_counts", None)
        if counts is not None:
            images = {key: gathered(value, counts) for key, value in images.items()}
        seen = self.looked_at(model, images) if images else {}
        prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": marks.get("position_ids", places)}
        return seen | prompt

    def texts(self, model: Any, processor: Processor, ids: Sequence[Sequence[int]]) -> list[str]:
        found = self.talk.tokenizer(processor).batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]

    def looked_at(self, model: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the vision graph's inputs, one row each picture or tile. Raises UsageError for pictures it cannot take."""
        return images

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth pictures for the vision tower; for the language model image tokens, and 16 tokens of text around them."""
        if tower == "vision":
            return self.example_images(model, batch)
        c = model.config
        count, width = self.example_image_tokens(model), self.image_width(model)
        generator = torch.Generator().manual_seed(0)
        reserved = sorted({c.image_token_id, getattr(c, "video_token_id", None) or c.image_token_id})
        ids = torch.randint(c.text_config.vocab_size - len(reserved), (batch, 16), generator=generator)
        for token in reserved:
            ids += ids >= token
        ids = torch.cat([ids[:, :4], torch.full((batch, count), c.image_token_id), ids[:, 4:]], dim=1)
        positions = torch.arange(ids.shape[1] - 8, ids.shape[1]).expand(batch, -1).contiguous()
        mask = torch.ones_like(ids)
        dtype = next(model.parameters()).dtype
        return {
            "image_tokens": torch.randn(batch, count, width, generator=generator).to(dtype),
            "input_ids": ids,
            "attention_mask": mask,
            "answer_positions": positions,
            "answer_mask": torch.ones_like(positions),
            **self.marks(model, ids, mask, mask, self.example_images(model, batch)),
        }

    def image_width(self, model: Any) -> int:
        """Return C of the image tokens."""
        return int(model.config.text_config.hidden_size)

    def deep(self, model: Any) -> int:
        """Return how many of the language model's first blocks are given something of the picture beside the image tokens."""
        return 0

    def exporting(self, model: nn.Module) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def write_config(self, model: Any) -> None:
        """Write depths and uniform widths of both towers."""
        vision, language = self.towers(model)
        self.write_vision_config(model, vision)
        write_language_config(model.config.text_config, language.blocks)

    @abstractmethod
    def write_vision_config(self, model: Any, tower: Tower) -> None:
        """Write depth and uniform widths of the vision tower."""

    def shown(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> Shown:
        """Return how picture `row` of `inputs` stands in a prompt."""
        return Shown(self.image_tokens_of(model, processor)[0], self.placeholders(model, processor, inputs, row))

    def image_tokens_of(self, model: Any, processor: Processor) -> tuple[str, ...]:
        """Return the tokens that stand for pictures, that of an image first."""
        token: str = self.talk.tokenizer(processor).convert_ids_to_tokens(model.config.image_token_id)
        return (token,)

    def _images(self, model: Any, processor: Processor, visuals: Sequence[Any]) -> dict[str, Tensor]:
        if processor.image is None:
            raise UsageError("this checkpoint has no image processor", hint="add its preprocessor_config.json")
        inputs = self.image_inputs(model, processor, visuals)
        dtype = next(model.parameters()).dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def _asked(
        self, model: Any, processor: Processor, samples: Sequence[Sample]
    ) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Return the pictures' inputs, and what is asked in tokens, image tokens included.

        The inputs are one row a sample where each has one picture; else (B, K, …), zeros behind, and image_counts (B,), how many
        of the K are there.
        """
        for sample in samples:
            if sample.audio is not None and not sample.shown:
                raise UsageError(
                    f"sample '{sample.key}' has a recording, and {self.name} models hear nothing",
                    hint="give them pictures, or choose a speech model such as Whisper",
                )
        visuals = [self.visuals(sample) for sample in samples]
        counts = [len(own) for own in visuals]
        images = self._images(model, processor, [one for own in visuals for one in own]) if any(counts) else {}
        tokens = self.image_tokens_of(model, processor)
        rows = iter(range(sum(counts)))
        prompts = []
        for sample, count in zip(samples, counts, strict=True):
            shown = [self.shown(model, processor, images, next(rows)) for _ in range(count)]
            prompts.append(self.talk.prompt(processor, sample, shown, tokens))
        images = {key: images[key] for key in self.image_keys if key in images}
        if images and set(counts) != {1}:
            images = {key: spread(value, counts) for key, value in images.items()}
            images["image_counts"] = torch.tensor(counts)
        return images, prompts

    def _row_up(
        self, model: Any, rows: Sequence[list[int]], samples: Sequence[Sample], left: bool
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and mask (B, N), padded on one side. Raises UsageError for a row longer than the model takes."""
        limit = int(getattr(model.config.text_config, "max_position_embeddings", 0)) or max(map(len, rows))
        longest = max(map(len, rows))
        for row, sample in zip(rows, samples, strict=True):
            if len(row) > limit:
                count = len(sample.one_by_one())
                raise UsageError(
                    f"sample '{sample.key}' takes {len(row)} tokens with its {f'{count} pictures' if count > 1 else 'picture'}; "
                    f"{self.name} takes {limit}",
                    hint="show fewer pictures" if count > 1 else "ask a shorter question, or use a smaller picture",
                )
        padding = model.generation_config.pad_token_id or 0
        ids = torch.full((len(rows), longest), padding)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            ids[index, place], mask[index, place] = torch.tensor(row), 1
        return ids, mask
