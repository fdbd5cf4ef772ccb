"""Gates: factors on what units (attention heads, MLP neurons) give to the Linear that reads them.

A gate of 1 changes nothing, one of 0 is the unit's removal (masked equals sliced, since a unit reaches the rest of the model
through its reader's columns alone); in between the unit fades. Gates are leaves of the graph, so their gradients say what opening
each a little further would do to the loss, and add up over backward passes as all gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Gates:
    """The gates of some Linears, by path: one for each unit of `units`, all 1."""

    def __init__(self, model: nn.Module, units: Mapping[str, int]) -> None:
        self.modules = {path: model.get_submodule(path) for path in units}
        self.values = {
            path: torch.ones(units[path], device=module.weight.device, requires_grad=True)  # type: ignore[arg-type]
            for path, module in self.modules.items()
        }

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it is open, every Linear reads its input (…, U*width) times its gates (U,), each over the width of its unit."""
        handles = [module.register_forward_pre_hook(_gated(self.values[path])) for path, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def set(self, path: str, values: Tensor) -> None:
        """Set the gates of one Linear."""
        self.values[path].copy_(values)

    def take_gradients(self) -> dict[str, Tensor]:
        """Return what gradients have added up to, and begin anew; zeros where nothing that was computed depends on a gate."""
        taken = {}
        for path, value in self.values.items():
            taken[path] = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = None
        return taken


def _gated(gates: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0]
        wide = gates.repeat_interleave(states.shape[-1] // len(gates))
        return (states * wide.to(states.dtype), *args[1:])

    return before
