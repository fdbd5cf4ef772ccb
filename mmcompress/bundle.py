"""What passes work on: a model with its processor and history; and what a family has to give for its models.

Where things are in the model is said by `views`.

Shape alphabet: B batch, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError, closest
from mmcompress.manifest import Record, Source
from mmcompress.views import Tower

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.data import Sample


class Family(Protocol):
    """All that is known about one kind of transformers model. Families hold names, never algorithms."""

    name: str
    model_types: tuple[str, ...]
    """The `model_type` values of config.json this family serves."""
    architectures: tuple[str, ...]
    """The transformers class names it serves."""

    def model_class(self, config: Any) -> type[nn.Module]:
        """Return the transformers class to build for this config."""

    def towers(self, model: nn.Module) -> tuple[Tower, ...]:
        """Return the views of `model` as it is now, vision first."""

    def encode(self, model: nn.Module, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return what the tower makes of each sample, (B, C), with gradient.

        Of a dual encoder that is the embedding in the shared space, not normalised. Passes judge a tower by the cosine of
        these rows, so a family without embeddings gives rows whose cosine means closeness of its outputs.
        """

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return what `sample` has for this tower, as `prepare` takes it: its image, its texts; nothing where it has none."""

    def prepare(self, model: nn.Module, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return the inputs of `encode` for items of one tower."""

    def example_inputs(self, model: nn.Module, tower: str, batch: int) -> dict[str, Tensor]:
        """Return valid inputs of `encode` for shapes, tracing and timing; the same every time."""

    def exporting(self, model: nn.Module) -> AbstractContextManager[None]:
        """While active, `model` computes the same in a way that can be traced with a dynamic batch."""

    def write_config(self, model: nn.Module) -> None:
        """Write uniform widths and depths of the modules into model.config, as far as the config can say them."""


@runtime_checkable
class DualEncoder(Protocol):
    """What a family adds whose towers share one embedding space: "text", and the tower of what texts describe."""

    media: Literal["vision", "audio"]
    """The tower of what texts describe."""

    def similarity(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return (scale, bias): logits are scale * cosine + bias."""

    def cut_texts(self, model: nn.Module, processor: Processor, texts: Sequence[str]) -> tuple[int, int]:
        """Return how many texts lose their end in `prepare`, and the limit in tokens."""


@runtime_checkable
class Generator(Protocol):
    """What a family adds whose models answer in text."""

    def generate(self, model: nn.Module, processor: Processor, samples: Sequence[Sample]) -> list[str]:
        """Return the model's greedy answer to each sample: its caption, its transcript. Deterministic."""


@runtime_checkable
class Piecewise(Protocol):
    """What a generating family adds whose samples may be longer than its models take at once."""

    def pieces(self, processor: Processor, sample: Sample) -> list[Sample]:
        """Return samples that the model takes, in order; its answers to them, joined by spaces, are its answer to `sample`."""


@runtime_checkable
class TeacherForced(Protocol):
    """What a family adds whose models can be led through a given answer: its probability, and learning from a better model."""

    answering: str
    """The tower whose `encode` rows are sqrt(p) of next-token distributions p (B, T, V), as (B, T * V); zero at padding."""

    def next_tokens(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return (B, T) int64 for what `prepare` made of that tower's items: the token that the answer has next at each place.

        -1 where the place belongs to no answer (prompt, padding), and where an answer that was cut may go on.
        """


@dataclass
class Processor:
    """Preprocessing of images, sound and text; a checkpoint has those its model needs."""

    image: Any = None
    tokenizer: Any = None
    audio: Any = None
    """transformers' feature extractor of a speech model."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The preprocessing files as they were read; written back unchanged, which re-serialising would not do."""

    def save(self, directory: str) -> None:
        """Write the preprocessing files beside the weights."""
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)
        for part in (self.image, self.tokenizer, self.audio):
            if part is not None and not self.files:
                part.save_pretrained(directory)


@dataclass(frozen=True)
class Cut:
    """A few samples, cut into what a model takes at once."""

    pieces: list[Sample]
    counts: list[int]
    """How many pieces each sample has."""

    @classmethod
    def of(cls, family: object, processor: Processor, samples: Sequence[Sample]) -> Cut:
        """Cut `samples` where the family is `Piecewise`. Raises what decoding them raises."""
        if not isinstance(family, Piecewise):
            return cls(list(samples), [1] * len(samples))
        found = [family.pieces(processor, sample) for sample in samples]
        return cls([piece for pieces in found for piece in pieces], [len(pieces) for pieces in found])

    @property
    def portions(self) -> list[list[Sample]]:
        """The pieces, as many at a time as there are samples."""
        size = len(self.counts)
        return [self.pieces[start : start + size] for start in range(0, len(self.pieces), max(size, 1))]

    def joined(self, texts: Sequence[str]) -> list[str]:
        """Return one text a sample from one text a piece."""
        rest = iter(texts)
        own = [[next(rest) for _ in range(count)] for count in self.counts]
        return [parts[0] if len(parts) == 1 else " ".join(filter(None, map(str.strip, parts))) for parts in own]


@dataclass
class Bundle:
    """A model, its processor and its history. `model` stays an ordinary transformers model."""

    model: Any
    processor: Processor
    family: Family
    source: Source
    history: list[Record] = field(default_factory=list)

    in_step: ClassVar[bool] = False
    """Whether `encode_all` runs all batches together, layer by layer."""

    def towers(self) -> tuple[Tower, ...]:
        """Return fresh views; never keep one across surgery."""
        return self.family.towers(self.model)

    def tower(self, name: str) -> Tower:
        """Return the tower called `name`. Raises UsageError naming the towers there are."""
        towers = {tower.name: tower for tower in self.towers()}
        if name not in towers:
            raise UsageError(f"{self.family.name} has no tower '{name}'", hint=closest(name, towers))
        return towers[name]

    def module(self, path: str) -> nn.Module:
        """Return the module at a dotted path."""
        return self.model.get_submodule(path)

    def layer(self, path: str) -> nn.Module:
        """Return the module at a dotted path to read its weights, which `module` need not have (see `streamed`)."""
        return self.module(path)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put `module` in the place `path` names."""
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return embeddings (B, C) of one tower, not normalised, with gradient."""
        return self.family.encode(self.model, tower, inputs)

    def encode_all(
        self,
        tower: str,
        batches: Iterable[dict[str, Tensor]],
        goes_on: Callable[[dict[str, Tensor]], None] = lambda inputs: None,
        reached: Callable[[Tensor], None] = lambda tensor: None,
    ) -> Iterator[Tensor]:
        """Yield what `encode` returns of each batch, without gradient; of a model that is not in memory, too (see `streamed`).

        `goes_on(inputs)` is told which batch is run from here. `reached(tensor)` may be told that all batches have come to what
        is computed with a parameter or buffer; those it is never told were reached when the last batch ended.
        """
        for inputs in batches:
            goes_on(inputs)
            with torch.inference_mode():
                rows = self.encode(tower, inputs)
            yield rows

    def aside(self, path: str, module: nn.Module) -> nn.Module:
        """Return `module`, made to be swapped in at `path` later, as it can be kept until then (see `streamed`)."""
        return module

    def example_inputs(self, tower: str, batch: int = 1) -> dict[str, Tensor]:
        """Return deterministic valid inputs of `encode`, on the model's device."""
        inputs = self.family.example_inputs(self.model, tower, batch)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def prepare(self, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Turn items of a tower (images, texts) into the inputs of `encode`, on the model's device."""
        made = self.family.prepare(self.model, self.processor, tower, items)
        return {name: value.to(self.device) for name, value in made.items()}

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return what a sample has for a tower, as `prepare` takes it."""
        return self.family.items(tower, sample)

    @property
    def dual(self) -> DualEncoder:
        """The family, as one whose towers share an embedding space. Raises UsageError where they do not."""
        if not isinstance(self.family, DualEncoder):
            raise UsageError(f"{self.family.name} models embed nothing into a shared space", hint="use a dual encoder")
        return self.family

    @torch.inference_mode()
    def embed(self, tower: str, items: Sequence[Any]) -> np.ndarray:
        """Return float32 embeddings (B, C) of images or texts, in evaluation mode."""
        self.model.eval()
        return self.encode(tower, self.prepare(tower, items)).float().cpu().numpy()

    @torch.inference_mode()
    def generate(self, samples: Sequence[Sample]) -> list[str]:
        """Return the model's greedy answer to each sample. Raises UsageError where the family answers nothing."""
        family = self.family
        if not isinstance(family, Generator):
            raise UsageError(f"{family.name} models do not answer in text", hint="evaluate their embeddings")
        self.model.eval()
        cut = Cut.of(family, self.processor, samples)
        found = [family.generate(self.model, self.processor, part) for part in cut.portions]
        return cut.joined([text for texts in found for text in texts])

    @property
    def forced(self) -> TeacherForced:
        """The family, as one that can be led through a given answer. Raises UsageError where it cannot."""
        if not isinstance(self.family, TeacherForced):
            raise UsageError(
                f"{self.family.name} models give no probabilities of answers", hint="evaluate what they answer or embed"
            )
        return self.family

    @property
    def describes(self) -> Literal["image", "audio"]:
        """What the texts of a dual encoder describe; "image" of other models."""
        return "audio" if isinstance(self.family, DualEncoder) and self.family.media == "audio" else "image"

    def embed_samples(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return float32 embeddings (B, C) of the samples' pictures or recordings, not normalised. Raises what decoding does."""
        media = self.dual.media
        found = [item for sample in samples for item in self.items(media, sample)]
        if len(found) != len(samples):
            lacking = next(sample.key for sample in samples if not self.items(media, sample))
            raise UsageError(
                f"sample '{lacking}' has nothing for the {media} tower", hint=f"use data with {media} for every sample"
            )
        return self.embed(media, found)

    def cut_texts(self, texts: Sequence[str]) -> tuple[int, int]:
        """Return how many texts are longer than the model takes, and that limit in tokens."""
        return self.dual.cut_texts(self.model, self.processor, texts)

    def embed_images(self, images: Sequence[Image]) -> np.ndarray:
        """Return float32 embeddings (B, C), not normalised."""
        return self.embed("vision", images)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 embeddings (B, C), not normalised."""
        return self.embed("text", texts)
