"""What passes over Linears leave as it is: experts, whose weights lie in one parameter for all. `quantize` takes them, too."""

from __future__ import annotations

from collections.abc import Iterable

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_layers import bytes_of, weighed
from mmcompress.surgery.experts import QuantizedExperts, stacked_shape
from mmcompress.views import Experts, Tower


def say_left(
    bundle: Bundle, towers: Iterable[Tower], context: Context, stay: str, *, floats: bool = False
) -> dict[str, dict[str, int]]:
    """Say how much of `towers` are experts, and what they `stay`; return it as facts, none where there are no experts.

    `floats`: of those alone that are no integers.
    """
    left: dict[str, int] = {}
    for tower in towers:
        held = [block.experts for block in tower.blocks if block.experts]
        found = [each for each in held if not (floats and isinstance(bundle.module(each.holder), QuantizedExperts))]
        if found:
            left[tower.name] = sum(_weights(bundle, each) for each in found)
            share = weighed(bundle.module(each.holder) for each in found) / bytes_of(bundle, tower)
            of = "its experts" if len(found) == len(held) else f"the experts of {len(found)} of {len(held)} blocks"
            context.progress.say(
                f"{tower.name}: {of} stay {stay}, {left[tower.name]:,} weights, now {share:.0%} of the tower's bytes; "
                "mmc prune --units experts removes some"
            )
    return {"experts_left": left} if left else {}


def _weights(bundle: Bundle, experts: Experts) -> int:
    return sum(stacked_shape(bundle.model, name).numel() for name in experts.stacked)
