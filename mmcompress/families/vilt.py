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
from mmcompress.families.anatomy import FLAVA_BLOCK, example_pixels, example_tokens, read_blocks, widths
from mmcompress.families.answers import roots
from mmcompress.families.two_tower import in_dtype_of, tokenizer_of
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
        inputs = in_dtype_of(model, inputs)
        text = inputs["input_ids"].shape[1]
        pooled: Tensor = model.vilt(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"][:, :text],
            image_embeds=self.image_tokens(model, inputs["pixel_values"], inputs["pixel_mask"]),
            pixel_mask=inputs["attention_mask"][:, text:],
        ).pooler_output
        return self.rows(model, pooled)

    def image_tokens(self, model: Any, pixels: Tensor, mask: Tensor) -> Tensor:
        """Return the class token and the patches (B, 1 + N, C), with positions stretched over each picture's own part."""
        embeddings = model.vilt.embeddings
        patches = embeddings.patch_embeddings(pixels)  # (B, C, rows, columns)
        table = embeddings.position_embeddings
        side = model.config.image_size // model.config.patch_size
        grid = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        shown = self.shown(model, mask)
        positions = torch.zeros_like(patches)
        for row, part in enumerate(shown):
            high, wide = int(part[:, 0].sum()), int(part[0].sum())
            stretched = nn.functional.interpolate(grid, size=(high, wide), mode="bilinear", align_corners=True)
            positions[row, :, :high, :wide] = stretched[0]
        tokens = (patches + positions).flatten(2).transpose(1, 2)
        first = (embeddings.cls_token + table[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], dim=1)

    def shown(self, model: Any, mask: Tensor) -> Tensor:
        """Return which patches show something of the picture (B, rows, columns), from a mask of pixels (B, H, W)."""
        patch = model.config.patch_size
        return mask[:, ::patch, ::patch][:, : mask.shape[1] // patch, : mask.shape[2] // patch]

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
        return torch.cat([text, torch.ones_like(text[:, :1]), self.shown(model, pixels).flatten(1).long()], dim=1)


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
        return roots(model.classifier(pooled))

    def generate(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> list[str]:
        """Return the likeliest of the model's answers to each sample's question. Raises what `prepare` raises."""
        inputs = {
            name: value.to(model.device) for name, value in self.prepare(model, processor, "joint", samples).items()
        }
        return [str(model.config.id2label[int(best)]) for best in self.encode(model, "joint", inputs).argmax(-1)]


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


ANSWERER, RETRIEVER = ViltAnswerer(), ViltRetriever()
