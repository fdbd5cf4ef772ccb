"""What a bundle costs to hold and to run, recounted on the model as it is now."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.measure.size import parameters
from mmcompress.surgery.counting import macs_within


@dataclass(frozen=True)
class TowerCost:
    """One tower's share, shared tensors once."""

    parameters: int
    bytes: int
    """In memory at the present dtypes."""
    macs: int
    """Of one sample at the tower's example size; without those of an encoder that a decoder looks at."""


@dataclass(frozen=True)
class Cost:
    """Parameters and bytes of the whole model, and every tower's own."""

    parameters: int
    bytes: int
    towers: dict[str, TowerCost]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cost_of(bundle: Bundle) -> Cost:
    """Recount parameters, bytes and MACs (batch 1, example inputs). Runs each tower once."""
    whole = parameters(bundle.model)
    towers = {}
    for tower in bundle.towers():
        parts = [bundle.module(path) for path in tower.roots]
        counted = macs_within(parts, functools.partial(bundle.encode, tower.name, bundle.example_inputs(tower.name)))
        held = parameters(nn.ModuleList(parts))
        towers[tower.name] = TowerCost(held.elements, held.bytes, counted)
    return Cost(whole.elements, whole.bytes, towers)
