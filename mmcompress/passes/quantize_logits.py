"""Which attentions compute their logits, queries times keys, of integers.

OpenVINO does so where both are rounded as their Linears give them out, and what lies between only moves them, head by head. So
places must not turn them there (rotary), keys must not wait in a cache of floats (decoders), and each needs a Linear of its own: a
fused one gives out the values as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.quantize_layers import candidates
from mmcompress.passes.quantize_schemes import AUTO
from mmcompress.surgery.low_rank import LowRankLinear, factor_paths
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize


def pairs_of(bundle: Bundle, tower: Tower, among: Collection[str]) -> dict[str, str]:
    """Return query Linear -> key Linear of the attentions of `tower` that can; both in `among`."""
    found = {}
    for block in tower.blocks:
        attention = block.attention
        if len(attention.writers) == 3 and not attention.turned and block.cross is None:
            query, key = (_writing(bundle, path) for path in attention.writers[:2])
            if query in among and key in among:
                found[query] = key
    return found


def of_layers(pairs: Mapping[str, str], layers: Mapping[str, str]) -> dict[str, str]:
    """Return those of `pairs` of which both have W8A8 in `layers`."""
    return {query: key for query, key in pairs.items() if layers.get(query) == layers.get(key) == "W8A8"}


def rounds_output(path: str, decisions: Mapping[str, Any]) -> bool:
    """Whether a plan says that a layer's outputs are rounded."""
    pairs = decisions.get("logits", {})
    return path in pairs or path in pairs.values()


def require_logits(settings: Quantize, bundle: Bundle) -> None:
    """Raise UsageError where int8 logits are asked for and no tower to be quantized can have them."""
    towers = [tower for tower in bundle.towers() if settings.scheme_of(tower.name) in ("W8A8", AUTO)]
    layers = {tower.name: candidates(bundle, tower, settings.tables, settings.keep_float) for tower in towers}
    if not any(pairs_of(bundle, tower, layers[tower.name]) for tower in towers):
        raise UsageError(
            f"quantize.logits is 'int8', but no attention of {', '.join(layers) or 'a tower with W8A8'} multiplies what query "
            "and key Linears of 8 bits give out: places turn it, keys wait in a cache, one Linear makes both, or they stay float",
            hint="leave it out",
        )


def _writing(bundle: Bundle, path: str) -> str:
    return factor_paths(path)[1] if isinstance(bundle.module(path), LowRankLinear) else path
