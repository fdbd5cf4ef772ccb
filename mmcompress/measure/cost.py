"""What a bundle costs to hold and to run, recounted on the model as it is now."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mmcompress.bundle import Bundle
from mmcompress.measure.macs import macs
from mmcompress.measure.size import parameters


@dataclass(frozen=True)
class TowerCost:
    """One tower's share."""

    parameters: int
    bytes: int
    """In memory at the present dtypes."""
    macs: int
    """Of one sample at the tower's example size."""


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
        parts = [parameters(bundle.module(path)) for path in (tower.path, *tower.heads)]
        counted = macs(lambda name=tower.name, **inputs: bundle.encode(name, inputs), bundle.example_inputs(tower.name))
        towers[tower.name] = TowerCost(sum(p.elements for p in parts), sum(p.bytes for p in parts), counted.total)
    return Cost(whole.elements, whole.bytes, towers)
