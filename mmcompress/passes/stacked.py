"""What passes over Linears leave as it is: experts, whose weights lie in one parameter for all."""

from __future__ import annotations

from collections.abc import Iterable

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_layers import bytes_of
from mmcompress.views import Tower


def say_left(bundle: Bundle, towers: Iterable[Tower], context: Context, stay: str) -> dict[str, dict[str, int]]:
    """Say how much of `towers` are experts, and what they `stay`; return it as facts, none where there are no experts."""
    left: dict[str, int] = {}
    for tower in towers:
        names = [name for block in tower.blocks if block.experts for name in block.experts.stacked]
        if names:
            weights = [bundle.model.get_parameter(name) for name in names]
            left[tower.name] = sum(weight.numel() for weight in weights)
            share = sum(weight.nbytes for weight in weights) / bytes_of(bundle, tower)
            context.progress.say(
                f"{tower.name}: its experts stay {stay}, {left[tower.name]:,} weights, now {share:.0%} of the tower's bytes; "
                "mmc prune --units experts removes some"
            )
    return {"experts_left": left} if left else {}
