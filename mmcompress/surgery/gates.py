"""Gates: factors on what units (heads, neurons) give to the Linear that reads them, and on what blocks change in their input.

A gate of 1 changes nothing, one of 0 is the unit's removal (masked equals sliced, since a unit reaches the rest of the model
through its reader's columns alone, and a block that changes nothing may as well be left out); in between the unit fades. Gates
are leaves of the graph, so their gradients say what opening each a little further would do to the loss, and add up over backward
passes as all gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.surgery.watch import first_state


class Gates:
    """The gates of some Linears, one for each unit of `units`, and of some blocks, one each; by path, all 1."""

    def __init__(self, model: nn.Module, units: Mapping[str, int], blocks: Sequence[str] = ()) -> None:
        self.modules = {path: model.get_submodule(path) for path in units}
        self.blocks = {path: model.get_submodule(path) for path in blocks}
        self.values = {
            path: torch.ones(units.get(path, 1), device=next(module.parameters()).device, requires_grad=True)
            for path, module in (self.modules | self.blocks).items()
        }

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it is open, every Linear reads its input (…, U*width) times its gates (U,), each over the width of its unit.

        A block gives out its input and the gate's (1,) share of what it changes in it.
        """
        handles = [module.register_forward_pre_hook(_gated(self.values[path])) for path, module in self.modules.items()]
        handles += [
            block.register_forward_hook(_skipped(self.values[path]), with_kwargs=True)
            for path, block in self.blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def set(self, path: str, values: Tensor) -> None:
        """Set the gates of one Linear or block."""
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


def _skipped(gate: Tensor) -> Callable[..., Any]:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        # Exact at both ends, which a sum of shares is not.
        mixed = torch.lerp(first_state(args, kwargs).to(states.dtype), states, gate.to(states.dtype))
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return after
