"""A model that notes, while it reads, which tokens of its prompt are a picture's: blocks and language models see rows alone.

`note_images` gives the model that is called with input_ids a `forward` of its own. Several may want to know.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.surgery.ledger import Ledger

ATTRIBUTE = "noting"


class Noted(Ledger):
    """Where it is noted."""

    image: Tensor | None = None
    """(B, T) booleans; None where the model was given rows in place of token ids."""

    def forget(self) -> None:
        """Forget what was noted of a prompt that has been read."""
        self.image = None


def note_images(model: nn.Module, images: Sequence[int], ledger: Noted) -> None:
    """Make `model` note in `ledger` as well which of its input_ids are one of `images`."""
    _, ledgers = getattr(model, ATTRIBUTE, ((), ()))
    setattr(model, ATTRIBUTE, (tuple(images), (*ledgers, ledger)))
    model.forward = MethodType(_forward, model)


def _forward(self: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    images, ledgers = getattr(self, ATTRIBUTE)
    if input_ids is not None:
        image = torch.isin(input_ids, torch.tensor(images, device=input_ids.device))
        for ledger in ledgers:
            ledger.image = image
    try:
        return type(self).forward(self, input_ids, *args, **kwargs)
    finally:
        for ledger in ledgers:
            ledger.forget()
