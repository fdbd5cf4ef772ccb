"""What passes work on: a model with its processor, and views that say where things are.

A view names modules by their dotted path from the model, so it can be recorded, compared and used on meta tensors. Views are
made afresh by `Bundle.towers()` each time; surgery makes older ones stale.

Shape alphabet: B batch, N tokens, C channels, H heads, D head width, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError, closest
from mmcompress.manifest import Record, Source

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.data import Sample

Readout = Literal["class", "mean", "attention", "all"]
Counts = Literal["heads", "kv_heads", "width"]
Numbering = Literal["each", "block", "after"]
"""How a value counts the blocks of a tower: one entry for each; the index of one or several blocks; or how many blocks come before
a place in the stack (negative: from the end, -1 behind the last)."""


@dataclass(frozen=True)
class Attention:
    """One multi-head attention: `writers` make queries, keys and values, `reader` mixes the heads' outputs."""

    path: str
    """The module that is called with hidden states."""
    writers: tuple[str, ...]
    """Paths of the q, k, v Linears; their rows are (heads * head_dim), of k and v (kv_heads * head_dim). A single path is a
    fused Linear: its rows are those of q, k and v one after the other, of equally many heads."""
    reader: str
    """Path of the output Linear; its columns are (heads * head_dim)."""
    heads: int
    kv_heads: int
    """Where there are fewer than `heads`, each serves as many query heads in a row (grouped-query attention)."""
    head_dim: int
    bookkeeping: tuple[tuple[str, str, Counts], ...] = ()
    """(module path, attribute, what it counts): integers transformers keeps beside the weights and that surgery must follow."""
    per_head: tuple[str, ...] = ()
    """Names of parameters (positions, heads) that hold a column for each head: a table of relative position biases."""
    why_whole: str = ""
    """Where heads cannot be cut: why not, for a person."""
    window: int = 0
    """How many keys each query sees, where those are not all."""


@dataclass(frozen=True)
class Mlp:
    """One feed-forward: `writers` is (up,) or (gate, up), `reader` is down. Units are its hidden neurons."""

    path: str
    writers: tuple[str, ...]
    reader: str
    neurons: int
    activation: str
    """Name of the activation, as in the config: removing a silenced neuron is exact only where act(0) = 0."""


@dataclass(frozen=True)
class Block:
    """One transformer block.

    A pre-norm block computes ``x += attend(x)`` then ``x += feed(x)``; `attend` and `feed` are the block's children to call in
    order, `attention` being one of `attend`. A block that is not of this shape (post-norm) leaves both empty, and passes
    that change tokens inside it refuse.
    """

    path: str
    index: int
    attention: Attention
    mlp: Mlp
    attend: tuple[str, ...] = ()
    feed: tuple[str, ...] = ()
    cross: Attention | None = None
    """In a decoder that looks at an encoder: queries come from this block's tokens, keys and values from the encoder's output."""


@dataclass(frozen=True)
class TokenStream:
    """The tokens that flow through a tower's blocks."""

    tokens: int
    """N at the model's own input size, protected ones included."""
    protected: int
    """Leading class/register tokens that are never merged or dropped."""
    readout: Readout
    """What the tower's output is read from."""
    pool: str = ""
    """For readout "attention": path of the nn.MultiheadAttention whose keys are the tokens."""


@dataclass(frozen=True)
class Tower:
    """One modality's encoder, with its projection into the shared space."""

    name: str
    path: str
    blocks_path: str
    """Path of the nn.ModuleList that holds the blocks."""
    blocks: tuple[Block, ...]
    config: str
    """Attribute path of the tower's config inside model.config ("" for the model's own)."""
    depth_key: str
    """The config key that counts the blocks."""
    heads: tuple[str, ...] = ()
    """Paths of what follows the blocks, inside `path` or not: a projection, the connector to a language model, its output layer."""
    parameters: tuple[str, ...] = ()
    """Names of parameters that belong to the tower but to none of these modules."""
    numbered: tuple[tuple[str, str, Numbering], ...] = ()
    """(path of a module or of a config inside model.config, attribute, how it counts the tower's blocks)."""
    why_fixed_depth: str = ""
    """Where blocks cannot be removed: why not, for a person. They may then lie in several lists below `blocks_path`."""
    needed: tuple[int, ...] = ()
    """Indices of blocks that cannot go: something beside the stack reads what they give out."""
    packed: bool = False
    """Whether the blocks see the tokens of all samples in one row, (N, C) instead of (B, N, C), or a row for each window."""
    embeddings: tuple[str, ...] = ()
    """Paths of the nn.Embedding tables and the patch embedding."""
    stream: TokenStream | None = None
    uncalled: tuple[str, ...] = ()
    """Paths of Linears whose weight their owner reads without calling them: they cannot be quantized."""
    tied: tuple[tuple[str, str], ...] = ()
    """Paths of (embedding table, Linear) that share one weight."""
    why_no_stream: str = ""
    """Where `stream` is None: why tokens of this tower cannot be merged, for a person."""

    def owns(self, name: str) -> bool:
        """Whether a parameter or module path belongs to this tower."""
        roots = (self.path, *self.heads, *self.parameters)
        return any(name == root or name.startswith(root + ".") for root in roots)

    @property
    def roots(self) -> tuple[str, ...]:
        """Paths of the modules that make up the tower, none inside another."""
        return (self.path, *(head for head in self.heads if not head.startswith(self.path + ".")))


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


@dataclass
class Bundle:
    """A model, its processor and its history. `model` stays an ordinary transformers model."""

    model: Any
    processor: Processor
    family: Family
    source: Source
    history: list[Record] = field(default_factory=list)

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
        if not isinstance(self.family, Generator):
            raise UsageError(f"{self.family.name} models do not answer in text", hint="evaluate their embeddings")
        self.model.eval()
        return self.family.generate(self.model, self.processor, samples)

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
