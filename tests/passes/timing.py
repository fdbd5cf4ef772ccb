"""A machine whose speed a test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import nn

from mmcompress.bundle import Bundle

Timer = Callable[[Bundle, tuple[str, ...]], float]


Layers = Callable[[nn.Module, int], float]


def nobody_asks(layer: nn.Module, rows: int) -> float:
    pytest.fail("no layer is timed")


@dataclass(frozen=True)
class Machine:
    """Takes for models what `timer` says, and for single layers what `layers` does."""

    timer: Timer
    layers: Layers

    def model(self, bundle: Bundle, stages: tuple[str, ...]) -> float:
        return self.timer(bundle, stages)

    def layer(self, layer: nn.Module, rows: int) -> float:
        return self.layers(layer, rows)


def timed_by(timer: Timer, layers: Layers = nobody_asks) -> Callable[[str], Machine]:
    """What a `Context` is given: in the fastest of the run's engines, models take what `timer` says."""

    def made(target: str) -> Machine:
        assert target == "", "no target is named"
        return Machine(timer, layers)

    return made
