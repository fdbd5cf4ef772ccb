"""How a model that answers in text is cut into graphs, and how its answer is written with them.

A family that implements `Exportable` names its parts in the order they run. The last one, the writer, is called again and again:
with all of the prompt and an empty past, then with one token and what it gave out before. Data flow by name, so that one loop
serves every family:

    inputs of the writer        what they are given
    input_ids (B, T)            the tokens that are not in the past yet
    inputs_embeds (B, T, C)     the same tokens as rows of the part that takes input_ids; at image tokens, rows of `image_embeds`
    attention_mask (B, P + T)   1 where there is a token; 0 in the padding, which lies on the left
    position_ids (B, …, T)      as the family gave them for the prompt, then one more than the largest so far
                                Where an earlier part gives out image_places (R, M, 1), a picture's M tokens go on taking
                                `Decoding.room` positions: each stands at its place, what follows behind all of them
    image_mask (B, T)           1 at image tokens
    attention_mask_I (B, P_I + T_I)   where image tokens leave on the way: as attention_mask, of what is behind the I-th place.
                                `asked` says how much of the prompt that is; each further token is one more
    past_NAME (B, H, P, D)      what it gave out as present_NAME; empty at first. P_I behind the I-th place. Of a cache that holds
                                integers past_key_I are codes, and there is past_key_scale_I (B, H, P, 1); the same of values
    anything else               what an earlier part gave out under that name or `asked` made, the same in every call

    outputs of the writer
    logits (B, V)               of the last token
    present_NAME (B, H, P + T, D)   none where all of the answer is said at once

Where a video's layers become fewer (`merge-frames`), a part "frames" makes image_embeds (M, N, C) of layer_embeds (R, N, C), one
row a picture or layer of a video, which the part that looks gives out; and of tables that `asked` made: frame_table_1 (3, M, R), of
zeros and a single one in each row, frame_table_2 where these become fewer again, and so on (see `ops.frames`).

An earlier part takes what `asked` made under the names of its inputs, or a part before it gave out, and runs once.

Shape alphabet: B batch, T tokens, P past tokens, H heads, D head width, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from mmcompress.bundle import Processor
    from mmcompress.data import Sample

BATCH, TOKENS, PAST = "batch", "tokens", "past"
MASK = "attention_mask"
"""Names of dynamic axes. "past + tokens" is their sum; other names are axes of their own; "" is a fixed size."""

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Part:
    """One graph of a model."""

    name: str
    compute: Callable[..., Tensor | tuple[Tensor, ...]]
    """Called with the model, then with the inputs in the order of `axes`."""
    outputs: tuple[str, ...]
    axes: Mapping[str, tuple[str, ...]]
    """Of every input, the names of its leading axes; those left out are fixed."""
    example: Callable[[Sizes], dict[str, Tensor]]
    """Returns valid inputs of the sizes asked for, the same every time, by the names of `axes`."""
    traced: Sizes = field(default_factory=dict)
    """The size of each dynamic axis but the batch while the part is traced; at least 2, for 1 would be taken as fixed."""
    corners: tuple[Sizes, ...] = ({},)
    """Sizes at which the graph is compared with torch, at every batch."""
    longest: Sizes | None = None
    """Sizes at which it is compared once, for one item."""
    most_tokens: int = 0
    """The most tokens a row may have, 0 where nothing says."""
    tables: int = 0
    """Bytes of what the graph holds beside the model's own tensors: masks and positions that are known beforehand."""
    choosing: bool = False
    """Whether it picks rows of its output by comparing numbers: engines whose last digits differ pick another now and then."""
    tower: str = ""
    """The tower whose blocks it runs, for finding where a graph differs."""


@dataclass(frozen=True)
class Decoding:
    """How a greedy answer is written."""

    end: tuple[int, ...]
    """Tokens that end an answer."""
    padding: int
    """What stands behind the end."""
    limit: int
    """The most tokens of an answer."""
    start: tuple[tuple[int, ...], ...] = ()
    """The tokens before every answer; where there are several the model takes the likeliest, such as a language. Empty where
    `asked` gives input_ids."""
    suppressed: tuple[int, ...] = ()
    """Tokens that are never written."""
    suppressed_first: tuple[int, ...] = ()
    """Tokens an answer does not begin with."""
    image_token: int | None = None
    """The token in whose places image_embeds stand."""
    room: int = 0
    """How many positions a picture takes where fewer tokens of it are given, which stand apart; 0: as many as its tokens."""
    questions: bool = True
    """Whether it can be asked something; else it only describes."""
    resizes: bool = False
    """Whether `asked` fits pictures to the one size that the parts know: answers are then the model's own to such pictures only."""


@runtime_checkable
class Divided(Protocol):
    """What a family adds whose models are exported as other graphs than its towers."""

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the parts in the order they run, a writer last. Raises UsageError for what cannot be exported."""


@runtime_checkable
class Exportable(Divided, Protocol):
    """What a family adds to `Generator` so that its models answer from exported graphs."""

    def decoding(self, model: Any) -> Decoding:
        """Return how `generate` writes. Asks a model's configs only, so one without weights will do.

        Raises UsageError for settings that this does not say.
        """

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return what the parts take of samples: the first part's inputs and, where `Decoding.start` is empty, the prompt."""

    def texts(self, model: Any, processor: Processor, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return answers as `generate` does, from their tokens without the start. Asks a model's config only."""
