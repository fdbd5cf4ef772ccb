"""transformers' cache of keys and values, made of tensors that an exported graph is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmcompress.surgery.rounded_cache import RoundedLayer

FLOATS, CODES = ("key", "value"), ("key", "key_scale", "value", "value_scale")
"""What graphs call the tensors of a block's cache, and of one that holds integers."""


def filled(tensors: tuple[Tensor, ...], names: tuple[str, ...] = FLOATS) -> DynamicCache:
    """Return a cache of each block's tensors `names`, one block after the other.

    They may be of no tokens at all: filling it by `update` would look at the number.
    """
    cache = DynamicCache()
    for first in range(0, len(tensors), len(names)):
        own = tensors[first : first + len(names)]
        cache.layers.append(RoundedLayer(*own) if names == CODES else _layer(*own))
    return cache


def held(cache: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a cache as `filled` takes them."""
    return tuple(
        getattr(layer, name)
        for layer in cache.layers
        for name in (layer.held_names if isinstance(layer, RoundedLayer) else ("keys", "values"))
    )


def nothing(states: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return the tensors `names` of a block that holds no tokens: keys, or values, are then `states` (B, H, 0, D)."""
    codes = (states.to(torch.int8), states[..., :1])
    return (*codes, *codes) if names == CODES else (states, states)


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values, layer.device = keys, values, keys.device
    layer.is_initialized = True
    return layer
