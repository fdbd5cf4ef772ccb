"""transformers' cache of keys and values, made of tensors that an exported graph is given."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def filled(tensors: tuple[Tensor, ...]) -> DynamicCache:
    """Return a cache of keys and values, which may be of no tokens at all: filling it by `update` would look at the number."""
    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.device = keys, values, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache
