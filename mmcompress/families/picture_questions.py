"""From questions about pictures to a model's inputs: the pictures made into numbers, the talk about them into tokens, rows of both.

Shape alphabet: B batch, N tokens, T answer tokens, K pictures of a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.answers import FORCED_TOKENS
from mmcompress.families.picture_rows import spread
from mmcompress.families.talk import Shown, Talk, require_no_tokens

if TYPE_CHECKING:
    from mmcompress.data import Sample


class PictureQuestions(ABC):
    """What `VisionLanguage` does before its model runs; a family says how pictures become inputs and what stands for them."""

    name: str
    image_keys: tuple[str, ...] = ("pixel_values",)
    """The inputs that are made of a picture."""
    talk = Talk()

    @abstractmethod
    def image_inputs(self, model: Any, processor: Processor, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return the inputs made of pictures, one row each."""

    @abstractmethod
    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        """Return the text that stands for picture `row`: its image token as often as the picture has tokens."""

    def marks(
        self, model: Any, ids: Tensor, mask: Tensor, prompt: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return further inputs of the language model, (B, …), from token ids and masks (B, N); `prompt` is 1 at what was asked."""
        return {}

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
        """Return the inputs made of samples' pictures, or of pictures; for the language model, of question and answer in its words.

        input_ids and attention_mask (B, N); answer_positions and answer_mask (B, T): the places that each predict a token of the
        first accepted answer, cut at `FORCED_TOKENS`. Raises UsageError where a picture, an image processor, a tokenizer or an
        image token is missing, and for a talk longer than the model takes.
        """
        if tower == "vision":
            looked = [one for item in items for one in ([item] if isinstance(item, Image) else self.visuals(item))]
            made = self._images(model, processor, looked)
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

    def texts(self, model: Any, processor: Processor, ids: Sequence[Sequence[int]]) -> list[str]:
        found = self.talk.tokenizer(processor).batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]

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
