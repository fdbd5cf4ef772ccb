"""What passes over Linears leave as it is: experts, whose weights lie in one parameter for all."""

from __future__ import annotations

from collections.abc import Iterable

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from mmcompress.views import Tower


def say_left(bundle: Bundle, towers: Iterable[Tower], context: Context, stay: str) -> dict[str, dict[str, int]]:
    """Say how much of `towers` are experts, and what they `stay`; return it as facts, none where there are no experts."""
    left: dict[str, int] = {}
    for tower in towers:
        names = [name for block in tower.blocks if block.experts for name in block.experts.stacked]
        if names:
            left[tower.name] = sum(bundle.model.get_parameter(name).numel() for name in names)
            whole = sum(value.numel() for name, value in bundle.model.named_parameters() if tower.owns(name))
            context.progress.say(
                f"{tower.name}: experts, {left[tower.name]:,} weights, stay {stay}; beside them there are "
                f"{whole - left[tower.name]:,} parameters. mmc prune --units experts removes some"
            )
    return {"experts_left": left} if left else {}
