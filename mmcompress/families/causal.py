"""Which tokens a token may look at when some of them are in a cache, as a mask that is added to attention scores.

transformers' own masks ask, while tracing, whether every entry is true; torch's exporter has no word for that (5.23, 2.13).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

HIDDEN = -10000.0
"""exp() of it is 0 in every precision, and it fits in float16."""


def causal_mask(past: int, tokens: int, dtype: torch.dtype, present: Tensor | None = None) -> Tensor:
    """Return (1, 1, T, P + T), or with `present` (B, P + T) one (B, 1, T, P + T): 0 where a token may look, else `HIDDEN`.

    A token looks at itself and what lies before it, except where `present` is 0.
    """
    rows, columns = torch.arange(tokens) + past, torch.arange(past + tokens)
    shown = (columns[None, :] <= rows[:, None])[None, None]
    if present is not None:
        # A row of padding looks at itself: what it makes of it is never read, and a softmax over nothing would be NaN.
        shown = shown & (present[:, None, None, :].bool() | (columns[None, :] == rows[:, None])[None, None])
    return torch.where(shown, torch.zeros((), dtype=dtype), torch.full((), HIDDEN, dtype=dtype))


def filled(tensors: tuple[Tensor, ...]) -> DynamicCache:
    """Return a cache of keys and values, which may be of no tokens at all: filling it by `update` would look at the number."""
    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache
