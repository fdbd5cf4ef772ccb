"""What a layout is: how another tool stores quantized layers, which it can say, and the entry of config.json that says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmcompress.surgery.float4 import Float4Linear
from mmcompress.surgery.float8 import Float8Linear
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear, TiedLinear
from mmcompress.surgery.quantized_base import Quantized


class Layout(Protocol):
    """One way of storing quantized layers."""

    @property
    def name(self) -> str: ...

    @property
    def loaded_by(self) -> str:
        """What loads it, for a person."""

    @property
    def scales(self) -> torch.dtype | None:
        """What scales are rounded to; None: nothing."""

    def refusal(self, path: str, layer: Quantized) -> str:
        """Return why a layer has to be floats, or "" where it can be said."""

    def kind(self, layer: Quantized) -> str:
        """Return what becomes of a layer that can be said, for a person."""

    def tensors(self, layer: Quantized) -> dict[str, Tensor]:
        """Return what takes the place of such a layer's `weight`."""

    def config(self, said: Mapping[str, Quantized], floats: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config` of a model with the layers `said` and the Linears `floats`."""


def why_no_linear(layer: Quantized) -> str:
    """Return why a layer is no Linear with a weight of its own; "" where it is one."""
    if isinstance(layer, TiedLinear):
        return "its weight is an embedding table's"
    if isinstance(layer, Float8Linear):
        return "8-bit floats"
    if not isinstance(layer, PackedLinear | QuantizedLinear | Float4Linear):
        return f"{type(layer).__name__.removeprefix('Quantized')}, no Linear"
    return ""


def input_grid(layer: Quantized) -> Tensor | None:
    """Return the zero point of a layer's rounded input, None where it is not rounded."""
    return getattr(layer, "input_zero_point", None)


def loses_rounding(layer: Quantized, said: bool) -> bool:
    """Whether a layer's inputs were rounded and are not where it is loaded: a layout keeps one grid for all tokens, if any."""
    return layer.tokens is not None or (not said and getattr(layer, "input_scale", None) is not None)
