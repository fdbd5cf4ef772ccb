"""What a model is made of, and which passes apply to which of its towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.measure.cost import cost_of
from mmcompress.surgery.experts import stacked_shape
from mmcompress.views import Tower

# What to ask a pass about one tower: parameters that make it do something there. Little, because embedding tables and projections
# are never cut, and can be most of a tower.
QUESTIONS: dict[str, dict[str, Any]] = {
    "prune": {"ratio": 0.05},
    "search-prune": {"ratio": 0.05},
    "trim-vocabulary": {},
    "factorize": {"ratio": 0.05},
    "narrow": {"ratio": 0.3},
    "rotate": {},
    "sparsify": {},
    "merge-tokens": {"keep": 0.5},
    "coarsen-tokens": {"keep": 0.5},
    "reduce-visual-tokens": {"keep": 0.5},
    "drop-visual-tokens": {"keep": 0.5},
    "merge-frames": {"stride": 2},
    "quantize": {},
    "distill": {},
}


def inspect(model: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Return a document about the model: towers with sizes and costs, passes with reasons, history. No weight is read."""
    bundle = checkpoint.outline(model, allow_pickle=allow_pickle)
    cost = cost_of(bundle)
    return {
        "model": bundle.source.id,
        "class": type(bundle.model).__name__,
        "family": bundle.family.name,
        "dtype": bundle.source.dtype,
        "parameters": cost.parameters,
        "bytes": cost.bytes,
        "towers": [{**_tower(bundle, tower), **vars(cost.towers[tower.name])} for tower in bundle.towers()],
        "passes": [
            {"pass": name, "tower": tower.name, **applies(bundle, name, tower)}
            for name in passes.PASSES
            for tower in bundle.towers()
        ],
        "history": [{"pass": record.name, "params": record.params} for record in bundle.history],
    }


def _tower(bundle: Bundle, tower: Tower) -> dict[str, Any]:
    mixtures = [block.experts for block in tower.blocks if block.experts]
    idle = sum(
        stacked_shape(bundle.model, name)[1:].numel() * (mixed.experts - mixed.top)
        for mixed in mixtures
        for name in mixed.stacked
    )
    return {
        "name": tower.name,
        "blocks": len(tower.blocks),
        "heads": _span([block.attention.heads for block in tower.blocks]),
        "head_dim": _span([block.attention.head_dim for block in tower.blocks]),
        "neurons": _span([block.feeding.neurons for block in tower.blocks]),
        "experts": _span([mixed.experts for mixed in mixtures]) if mixtures else None,
        "experts_per_token": _span([mixed.top for mixed in mixtures]) if mixtures else None,
        "parameters_idle_per_token": idle,
        "tokens": tower.stream.tokens if tower.stream else None,
        "readout": tower.stream.readout if tower.stream else None,
    }


def _span(values: Sequence[int]) -> str:
    """ "12" where all are equal, else "8-12"."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def applies(bundle: Bundle, name: str, tower: Tower, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return whether the pass `name` can do something to `tower`, and the reason where it cannot: {"applies", "reason"}.

    `params` are its parameters, by default such as change a little.
    """
    known = {parameter.name for parameter in passes.schema(name).parameters}
    where: dict[str, Any] = (
        {"tower": tower.name} if "tower" in known else {"towers": [tower.name]} if "towers" in known else {}
    )
    try:
        passes.build(name, {**(QUESTIONS.get(name, {}) if params is None else params), **where}).check(bundle)
    except UsageError as error:
        return {"applies": False, "reason": error.message}
    return {"applies": True, "reason": ""}
