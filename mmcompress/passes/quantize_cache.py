"""Which tower of a model has a cache that `quantize` can make integers of, and what a token takes there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.surgery.rounded_cache import rounds_cache
from mmcompress.views import Tower


def cached_tower(bundle: Bundle, named: Sequence[str]) -> Tower:
    """Return the language model whose blocks keep keys and values.

    Raises UsageError where there is none, where `named` towers, if any, leave it out, or where its cache holds integers already.
    """
    towers = bundle.towers()
    tower = next((tower for tower in towers if tower.prompt), None)
    if tower is None:
        looking = next((tower for tower in towers if any(block.cross for block in tower.blocks)), None)
        if looking is not None:
            raise UsageError(
                f"the {looking.name} blocks of {bundle.family.name} look at an encoder's states through a cache of its own, which "
                "transformers reads as floats, and beside which that of the answer is small",
                hint="leave quantize.cache at float",
            )
        raise UsageError(
            f"{bundle.family.name} models keep no keys and values: they write no answer token by token",
            hint="leave quantize.cache at float; it is for models that are shown pictures and answer in text",
        )
    if named and tower.name not in named:
        raise UsageError(
            f"quantize.cache is that of the {tower.name} tower, which quantize.towers does not name",
            hint=f"name it, with --{tower.name}-scheme W16A16 to leave its weights alone",
        )
    if any(rounds_cache(bundle.module(block.attention.path)) for block in tower.blocks):
        raise UsageError(
            f"the {tower.name} tower keeps keys and values as integers already", hint="leave quantize.cache at float"
        )
    return tower


def cache_bytes(bundle: Bundle) -> dict[str, Any]:
    """Return what a token takes in all blocks' caches together that became integers, before and now; nothing where none did.

    Floats, scales among them, are of the dtype the model computes in.
    """
    attentions = [block.attention for tower in bundle.towers() for block in tower.blocks]
    rounded = [attention for attention in attentions if rounds_cache(bundle.module(attention.path))]
    if not rounded:
        return {}
    size = next(bundle.model.parameters()).element_size()
    return {
        "cache_bytes_per_token_before": sum(2 * each.kv_heads * each.head_dim * size for each in rounded),
        "cache_bytes_per_token": sum(2 * each.kv_heads * (each.head_dim + size) for each in rounded),
    }
