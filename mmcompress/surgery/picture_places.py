"""A language model that is given fewer image tokens, each where it was in the picture: see `ops.positions`.

`bind_places` gives the language model a `forward` of its own that changes the positions it is called with; where tokens were, the
connector left in a `Seen` that both share. How much further what comes next stands is noted beside the cache. Parts of an exported
model are given positions that are right already: they are called without the model around them, which notes nothing then.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.ops.positions import evenly_placed, stand_apart
from mmcompress.surgery.cache_lengths import CACHE
from mmcompress.surgery.noting import Noted, note_images
from mmcompress.surgery.reducing import Choice

ATTRIBUTE = "standing"
FURTHER = "mmc_further"
"""Attribute of a cache: how much further (B, 1) than they count tokens behind it stand."""


@dataclass(frozen=True)
class Standing:
    """What a language model has to know."""

    choice: Choice
    noted: Noted = field(default_factory=Noted)


def bind_places(model: nn.Module, language: nn.Module, images: Sequence[int], choice: Choice) -> None:
    """Let the tokens that `choice` leaves stand where they were; `model` is called with input_ids and calls `language`."""
    own = Standing(choice)
    note_images(model, images, own.noted)
    setattr(language, ATTRIBUTE, own)
    language.forward = MethodType(_forward, language)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    own: Standing = getattr(self, ATTRIBUTE)
    cache = kwargs.get(CACHE)
    further: Tensor | int = getattr(cache, FURTHER, 0)
    image = own.noted.image
    if image is None:
        if cache is not None and hasattr(cache, FURTHER) and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + further
        return type(self).forward(self, *args, **kwargs)
    past = 0 if cache is None else cache.get_seq_length()
    count = image.shape[1]
    given = kwargs.get("position_ids")
    if given is None:
        given = torch.arange(past, past + count, device=image.device)[None]
    positions, more = stand_apart(given.expand(len(image), -1), image, _places(own, image), own.choice.tokens)
    kwargs["position_ids"] = positions + further
    if kwargs.get("attention_mask") is None:
        # Without a mask transformers takes a leap of the positions for the beginning of another text.
        kwargs["attention_mask"] = torch.ones(len(image), past + count, dtype=torch.long, device=image.device)
    made = type(self).forward(self, *args, **kwargs)
    held = getattr(made, CACHE, None) if cache is None else cache
    if held is not None:
        setattr(held, FURTHER, further + more)
    return made


def _places(own: Standing, image: Tensor) -> Tensor:
    """Return where the tokens of each picture were, (R, M); of ready-made ones nobody knows.

    They are known until others come: without a cache, `generate` looks at pictures once and hands over what was made of them again.
    """
    places, kept = own.choice.seen.places, own.choice.kept
    pictures = int(image.sum()) // kept
    if places is None or len(places) != pictures:
        places = evenly_placed(max(pictures, 1), kept, own.choice.tokens)
    return places.to(image.device)
