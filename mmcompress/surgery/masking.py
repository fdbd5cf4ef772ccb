"""Let a model compute as if units were gone, without cutting anything: hooks that are always removed.

What a Linear reads of a unit that is gone is 0, or a value of its own. That gives what cutting the unit's rows and columns gives,
with the value times the columns in the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def silencing(
    linears: Mapping[str, nn.Module], kept: Mapping[str, Tensor], instead: Mapping[str, Tensor]
) -> Iterator[None]:
    """While it is open, each of `linears` reads its channels where `kept` (C,) is true, and elsewhere `instead` (C,), else 0."""

    def hook(name: str) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states = args[0]
            value = instead[name].to(states.dtype) if name in instead else states.new_zeros(())
            return (torch.where(kept[name], states, value), *args[1:])

        return before

    handles = [linears[name].register_forward_pre_hook(hook(name)) for name in kept]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
