"""Caches of keys and values whose blocks hold different numbers of tokens: how many, and which of them are padding.

transformers counts by the first block (5.23), so that stays whole. What the others hold is noted beside the cache.

Shapes: B batch, P past tokens, M new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mmcompress.errors import UsageError

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""What transformers' models and blocks call the cache that they are given, and the one in what they return."""
FILLED = "mmc_filled"
"""Attribute of a cache: by place, which of the tokens that blocks behind it hold are none of padding, (B, P)."""


def held_by(cache: Any, layer: int) -> int:
    """Return P, how many tokens a block's cache holds. Raises UsageError for a cache of fixed size."""
    if cache is None or len(cache.layers) <= layer:
        return 0
    held = growing(cache.layers[layer], "dropping image tokens")
    if held.keys is None or held.keys.dim() < 4:
        return 0
    return held.keys.shape[-2]


def growing(layer: Any, who: str) -> DynamicLayer:
    """Return a cache's layer. Raises UsageError, for `who` got it, where it does not grow with its tokens."""
    if not isinstance(layer, DynamicLayer):
        raise UsageError(
            f"{who} got a cache of {type(layer).__name__}; expected one that grows with its tokens",
            hint='leave out cache_implementation, or set it to "dynamic"',
        )
    return layer


def change_held(layer: DynamicLayer, how: Callable[[Tensor], Tensor]) -> None:
    """Put in place of what a cache's layer holds, tensors (B, H, P, D or 1), what `how` makes of each."""
    for name in getattr(layer, "held_names", ("keys", "values")):
        setattr(layer, name, how(getattr(layer, name)))


def remember(cache: Any, place: int, past: int, room: Tensor) -> Tensor:
    """Return which of past tokens and slots (B, P + M) are none of padding, and note it beside the cache, if there is one.

    `past`: P. `room`: (B, M). Raises UsageError where the cache was changed in between.
    """
    known: dict[int, Tensor] = getattr(cache, FILLED, {})
    before = known.get(place, room[:, :0])[:, :past]  # a cache may have been cut at its end
    if before.shape != (len(room), past):
        raise UsageError(
            f"a cache holds {past} tokens for {len(room)} rows, and {before.shape[1]} for {len(before)} were put in",
            hint="rows of a cache from which image tokens have left cannot be chosen; start over with the prompt",
        )
    filled = torch.cat([before, room], dim=1)
    if cache is not None:
        setattr(cache, FILLED, {**known, place: filled})
    return filled
