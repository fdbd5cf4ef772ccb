"""What all quantized layers share: a weight that is made of integers when it is asked for, and takes their place only.

While integers train, a layer also has `master_weight`, floats of the weight's shape: its weight is then those, rounded to the
layer's own grid, with gradients straight through the rounding (see `surgery.master_weights`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcompress.ops.token_rounding import TokenGrid

AT_ONCE = 2**23
"""Numbers of a weight that are rounded, or floats, together: 32 MiB, and as much again a few times over."""


_UNREAD: ContextVar[bool] = ContextVar("unread", default=False)


@contextmanager
def weights_unread() -> Iterator[None]:
    """While active, `weight` of quantized layers has a shape and zeros that take no memory: for loading, and for counting.

    transformers fills every weight it knows before it looks which were loaded (5.23): made of integers, each would become floats
    for nothing, which took three quarters of the time of loading and as much memory again.
    """
    token = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def unread(shape: torch.Size, like: Tensor) -> Tensor | None:
    """Return what stands for a weight while `weights_unread` is active, in the dtype of `like`; None otherwise."""
    if not _UNREAD.get():
        return None
    shaped = torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)
    shaped._is_hf_initialized = True  # type: ignore[attr-defined]
    return shaped


class Quantized(nn.Module, ABC):
    """A layer whose weight is stored as integers: (C, …), a scale for each of its C rows or several."""

    weight_scale: Tensor
    input_gain: Tensor | None
    of_experts = False
    """Whether it is part of a mixture's experts, which transformers keeps in one."""
    tokens: TokenGrid | None = None
    """What each token's inputs are rounded to while the layer is called, if they are."""

    def input_grid(self) -> tuple[float, int] | None:
        """Return (scale, zero point) of the QuantizeLinear before the product when exported; None without one."""
        return None

    def output_grid(self) -> tuple[float, int] | None:
        """Return (scale, zero point) of the QuantizeLinear behind the bias when exported; None without one."""
        return None

    @property
    def repeated_bytes(self) -> int:
        """Bytes of scales that a graph holds more often than the layer: one for a row's every block."""
        return 0

    @property
    def reason_for_cpus(self) -> str:
        """Why TensorRT cannot read what the layer leaves as; "" where it can."""
        return ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # torch counts E4M3 among floats: `.half()` would widen what is stored in it. Seen as bytes it moves, and keeps its dtype.
        eight = torch.float8_e4m3fn
        return super()._apply(lambda t: fn(t.view(torch.uint8)).view(eight) if t.dtype == eight else fn(t), recurse)

    @property
    @abstractmethod
    def weight_shape(self) -> torch.Size:
        """The shape of `weight`, for free."""

    @abstractmethod
    def stored_rows(self, start: int, stop: int) -> Tensor:
        """Return what the integers of some rows stand for, in the dtype of the scales."""

    @abstractmethod
    def rounded(self, values: Tensor, rows: slice | Tensor) -> Tensor:
        """Return floats `values` of some rows at the nearest places of their grid; gradients are 1 inside it and 0 outside."""

    @abstractmethod
    def store_rows(self, values: Tensor, rows: slice) -> None:
        """Make the integers of some rows those nearest to `values`; scales stay."""

    @property
    def master(self) -> nn.Parameter | None:
        """The floats that train in the place of the integers, while they do."""
        return self._parameters.get("master_weight")

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of `weight` as floats, in the dtype of the scales."""
        master = self.master
        if master is None:
            return self.stored_rows(start, stop)
        whole = start == 0 and stop >= len(master)
        return self.rounded(master if whole else master[start:stop], slice(start, stop))

    @property
    def weight(self) -> Tensor:
        """The weight as floats, as it multiplies the rounded input. Not a parameter; models ask layers for its dtype and shape."""
        empty = unread(self.weight_shape, self.weight_scale)
        return self.weight_rows(0, self.weight_shape[0]) if empty is None else empty

    def rounded_input(self, x: Tensor) -> Tensor:
        """Return inputs (…, C) as they are multiplied in torch: floats, rounded where the layer rounds them."""
        return x

    def product_of_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return x (…, C) times some rows of the weight."""
        empty = unread(torch.Size((stop - start, self.weight_shape[1])), self.weight_scale)
        return functional.linear(self.rounded_input(x), self.weight_rows(start, stop) if empty is None else empty)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x weight' + bias; only `AT_ONCE` numbers of the weight are floats at a time."""
        rows, columns = self.weight_shape
        step = max(1, AT_ONCE // columns)
        if step >= rows or _UNREAD.get():
            return functional.linear(x, self.weight, bias)
        parts = []
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            parts.append(
                functional.linear(x, self.weight_rows(start, stop), None if bias is None else bias[start:stop])
            )
        return torch.cat(parts, dim=-1)


def chunks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of rows of `weight` that have about `AT_ONCE` numbers: a word table takes a gigabyte as it is."""
    step = max(1, AT_ONCE // max(1, weight[0].numel()))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)
