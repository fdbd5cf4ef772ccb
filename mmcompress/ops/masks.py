"""Which tokens a token may look at when some of them are in a cache, as a mask that is added to attention scores.

transformers' own masks ask, while tracing, whether every entry is true; torch's exporter has no word for that (5.23, 2.13).

Shapes: B batch, T tokens, P past tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -10000.0
"""exp() of it is 0 in every precision, and it fits in float16."""


def causal_mask(past: int, tokens: int, dtype: torch.dtype, present: Tensor | None = None) -> Tensor:
    """Return (1, 1, T, P + T), or with `present` (B, P + T) one (B, 1, T, P + T): 0 where a token may look, else `HIDDEN`.

    A token looks at itself and what lies before it, except where `present` is 0.
    """
    device = None if present is None else present.device
    rows, columns = torch.arange(tokens, device=device) + past, torch.arange(past + tokens, device=device)
    shown = (columns[None, :] <= rows[:, None])[None, None]
    if present is not None:
        # A row of padding looks at itself: what it makes of it is never read, and a softmax over nothing would be NaN.
        shown = shown & (present[:, None, None, :].bool() | (columns[None, :] == rows[:, None])[None, None])
    return as_added(shown, dtype)


def mask_both_ways(tokens: int, dtype: torch.dtype, present: Tensor) -> Tensor:
    """Return (B, 1, T, P + T): 0 where `present` (B, P + T) is 1, else `HIDDEN`, the same for every token."""
    return as_added(present[:, None, None, :].bool(), dtype).expand(-1, -1, tokens, -1)


def as_added(shown: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `shown` is true, else `HIDDEN`."""
    nothing = torch.zeros((), dtype=dtype, device=shown.device)
    return torch.where(shown, nothing, torch.full((), HIDDEN, dtype=dtype, device=shown.device))


def visible(mask: Tensor) -> Tensor:
    """Return where a mask lets look: one of booleans, or one that is added, transformers' or ours."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN / 2
