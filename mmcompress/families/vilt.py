"""ViLT: one encoder over the tokens of a text and the patches of a picture.

transformers draws the order of the patches at random (5.23, `visual_embed`), which changes the last bits of sums. Here they stay in
their places, padding masked, and go into the model ready-made.

Shape alphabet: B batch, T text tokens, N patches, C channels, V answers.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import ViltForImageAndTextRetrieval, ViltForQuestionAnswering

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import example_pixels, example_tokens, read_blocks, widths
from mmcompress.families.answers import roots
from mmcompress.families.block_names import FLAVA_BLOCK
from mmcompress.families.two_tower import in_dtype_of, tokenizer_of
from mmcompress.families.vilt_parts import cut, joint_part, pooled
from mmcompress.parts import Decoding, Part
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.data import Sample

BLOCKS = "vilt.encoder.layer"


class Vilt(ABC):
    """Base of both classes: everything but what is asked, and what the answer is read from."""

    name: str
    model_types: tuple[str, ...] = ("vilt",)
    architectures: tuple[str, ...]
    head: str
    """Path of what is behind the encoder."""

    @abstractmethod
    def built(self) -> type[nn.Module]:
        """Return the transformers class."""

    @abstractmethod
    def text(self, sample: Sample) -> str:
        """Return the text of a sample, "" where it has none."""

    @abstractmethod
    def rows(self, model: Any, pooled: Tensor) -> Tensor:
        """Return the rows of `encode` (B, …) from the pooled states (B, C)."""

    @abstractmethod
    def logits(self, model: Any, pooled: Tensor) -> Tensor:
        """Return what the model says (B, …) from the pooled states (B, C)."""

    def model_class(self, config: Any) -> type[nn.Module]:
        if config.max_image_length > 0:
            raise UsageError(
                f"config.json has max_image_length {config.max_image_length}: ViLT would draw that many patches at random",
                hint="set it to -1, which takes all",
            )
        return self.built()

    def towers(self, model: Any) -> tuple[Tower, ...]:
        return (
            Tower(
                name="joint",
                path="vilt",
                blocks_path=BLOCKS,
                blocks=read_blocks(model, BLOCKS, FLAVA_BLOCK, model.config.hidden_act),
                config="",
                depth_key="num_hidden_layers",
                heads=(self.head,),
                embeddings=(
                    *(f"vilt.embeddings.text_embeddings.{table}_embeddings" for table in ("word", "position")),
                    "vilt.embeddings.patch_embeddings.projection",
                ),
                why_no_stream="tokens of text and picture share a row, and ViLT gives no keys to match them by",
            ),
        )

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return one row per sample; see `rows` of the class, and `Family.encode`."""
        inputs = self.asked_of(model, in_dtype_of(model, inputs))
        return self.rows(model, pooled(model, *inputs.values()))

    @staticmethod
    def asked_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the graph takes, in its order, of what `prepare` made."""
        ids = inputs["input_ids"]
        cuts = cut(model, inputs["pixel_values"], inputs["pixel_mask"])
        return {"input_ids": ids, "attention_mask": inputs["attention_mask"][:, : ids.shape[1]], **cuts}

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the one graph."""
        return (joint_part(model, self.logits),)

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return the sample itself where it has a picture and a text; see `Family.items`."""
        return [sample] if sample.shown and self.text(sample) else []

    def prepare(self, model: Any, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return input_ids (B, T), pixel_values, pixel_mask (B, H, W) and attention_mask (B, T + 1 + N) of all the encoder sees.

        Raises UsageError where an image processor, a tokenizer or a text is missing, and for a text longer than the model takes.
        """
        if processor.image is None:
            raise UsageError("this checkpoint has no image processor", hint="add its preprocessor_config.json")
        texts = [self.text(sample) for sample in items]
        limit, rows = model.config.max_position_embeddings, tokenizer_of(processor)(texts)["input_ids"]
        for row, text, sample in zip(rows, texts, items, strict=True):
            if not text or len(row) > limit:
                said = f"has {len(row)} tokens of text; {self.name} takes {limit}" if text else "has no text"
                raise UsageError(
                    f"sample '{sample.key}' {said}",
                    hint="give every sample a short question or caption, as the model was made for",
                )
        counts = torch.tensor([len(row) for row in rows])
        longest, padding = int(counts.max()), model.config.pad_token_id or 0
        made = processor.image(images=[sample.image for sample in items], return_tensors="pt")
        pixels, mask = made["pixel_values"], made["pixel_mask"]
        return in_dtype_of(
            model,
            {
                "input_ids": torch.tensor([row + [padding] * (longest - len(row)) for row in rows]),
                "attention_mask": self._whole(model, (torch.arange(longest) < counts[:, None]).long(), mask),
                "pixel_values": pixels,
                "pixel_mask": mask,
            },
        )

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth pictures of the full size, and 16 tokens."""
        c = model.config
        ids = example_tokens(batch, min(16, c.max_position_embeddings), c.vocab_size, 2, c.pad_token_id or 0)
        mask = torch.ones(batch, c.image_size, c.image_size, dtype=torch.long)
        return {
            "input_ids": ids,
            "attention_mask": self._whole(model, torch.ones_like(ids), mask),
            "pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size),
            "pixel_mask": mask,
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

    def _whole(self, model: Any, text: Tensor, pixels: Tensor) -> Tensor:
        """Return the mask of text, class token and patches (B, T + 1 + N)."""
        shown = cut(model, pixels[:, None], pixels)["patch_mask"]
        return torch.cat([text, torch.ones_like(text[:, :1]), shown], dim=1)


class ViltAnswerer(Vilt):
    """ViltForQuestionAnswering: chooses among the answers that config.json lists."""

    name = "vilt"
    architectures: tuple[str, ...] = ("ViltForQuestionAnswering",)
    head = "classifier"

    def built(self) -> type[nn.Module]:
        return ViltForQuestionAnswering

    def text(self, sample: Sample) -> str:
        """Return the question."""
        return sample.question

    def rows(self, model: Any, pooled: Tensor) -> Tensor:
        """Return sqrt(p) of the distribution p over answers (B, V); 1 - cosine is about a quarter of a divergence."""
        return roots(self.logits(model, pooled))

    def logits(self, model: Any, pooled: Tensor) -> Tensor:
        """Return the answers' logits (B, V)."""
        made: Tensor = model.classifier(pooled)
        return made

    def generate(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> list[str]:
        """Return the likeliest of the model's answers to each sample's question. Raises what `prepare` raises."""
        inputs = {
            name: value.to(model.device) for name, value in self.prepare(model, processor, "joint", samples).items()
        }
        return self.texts(model, processor, self.encode(model, "joint", inputs).argmax(-1)[:, None].tolist())

    def decoding(self, model: Any) -> Decoding:
        """Return how it answers: with one of its answers, at once."""
        return Decoding(end=(), padding=0, limit=1)

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return self.asked_of(model, self.prepare(model, processor, "joint", samples))

    def texts(self, model: Any, processor: Processor, ids: Sequence[Sequence[int]]) -> list[str]:
        return [str(model.config.id2label[answer]) for (answer,) in ids]


class ViltRetriever(Vilt):
    """ViltForImageAndTextRetrieval: says how well one text fits one picture; it embeds neither into a shared space."""

    name = "vilt_retrieval"
    architectures: tuple[str, ...] = ("ViltForImageAndTextRetrieval",)
    head = "rank_output"

    def built(self) -> type[nn.Module]:
        return ViltForImageAndTextRetrieval

    def text(self, sample: Sample) -> str:
        """Return the first text."""
        return sample.texts[0] if sample.texts else ""

    def rows(self, model: Any, pooled: Tensor) -> Tensor:
        """Return the pooled states (B, C) that the score is read from; the score alone has no direction to compare."""
        return pooled

    def logits(self, model: Any, pooled: Tensor) -> Tensor:
        """Return the scores (B, 1)."""
        made: Tensor = model.rank_output(pooled)
        return made


ANSWERER, RETRIEVER = ViltAnswerer(), ViltRetriever()
