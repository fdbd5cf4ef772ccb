"""Weights that train although they are stored as integers: each layer holds floats meanwhile, its master weights.

    forward     the masters, rounded to the layer's own grid: what the layer will multiply by once they are integers again
    backward    gradients go straight through the rounding, and are 0 where a master lies outside the grid

That is quantization-aware training (Jacob et al. 2018, arXiv 1712.05877, section 3) with the straight-through estimator of Bengio
et al. 2013 (arXiv 1308.3432). Scales and zero points stay as they are; to learn them too (LSQ, arXiv 1902.08153) is left out.

Where masters begin: what an integer stands for lies in the middle of all numbers that are rounded to it, and says nothing of which
one it was. So a master is the original's float (divided by the layer's `input_gain`), if that lies in the grid and is rounded to
the integer that is stored; otherwise what the integer stands for. Thus nothing changes before the first step, whoever rounded (to
the nearest, HQQ, GPTQ) and whatever was folded, cut or trained since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmcompress.surgery.quantized import TiedLinear
from mmcompress.surgery.quantized_base import Quantized, chunks


def holders(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers that store a weight of their own, by path."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}
    return {path: layer for path, layer in found.items() if not isinstance(layer, TiedLinear)}


@dataclass
class Masters:
    """The master weights of some layers, and what became of them."""

    layers: Mapping[str, Quantized]
    values: dict[str, Tensor] = field(default_factory=dict)
    """What they begin as, float32."""
    given: int = 0
    """How many are the original's floats."""
    changed: int = 0
    """How many integers are others than before, once training is over."""

    @classmethod
    def of(cls, layers: Mapping[str, Quantized], original: nn.Module) -> Masters:
        """Return masters for `layers`, each begun as what stands under its path in `original`, where that is of its shape."""
        made = cls(layers)
        modules = dict(original.named_modules())
        for path, layer in layers.items():
            weight = getattr(modules.get(path), "weight", None)
            alike = isinstance(weight, nn.Parameter) and weight.shape == layer.weight_shape
            made.values[path], given = begun(layer, weight if alike else None)
            made.given += given
        return made

    @property
    def count(self) -> int:
        """How many numbers train."""
        return sum(layer.weight_shape.numel() for layer in self.layers.values())

    @contextmanager
    def training(self) -> Iterator[None]:
        """While active the layers hold masters, as parameters; afterwards integers, made of them unless there was an error."""
        for path, layer in self.layers.items():
            layer.register_parameter("master_weight", nn.Parameter(self.values.pop(path)))
        try:
            yield
            for layer in self.layers.values():
                self.changed += stored(layer)
        finally:
            for layer in self.layers.values():
                del layer.master_weight


@torch.no_grad()
def begun(layer: Quantized, original: Tensor | None) -> tuple[Tensor, int]:
    """Return the first master of a layer, and how many of its numbers are those of `original`, of its shape."""
    made = torch.empty(layer.weight_shape, device=layer.weight_scale.device)
    count = 0
    for rows in chunks(made):
        made[rows] = layer.stored_rows(rows.start, rows.stop)
        if original is None:
            continue
        floats = original[rows].to(made)
        if layer.input_gain is not None:
            floats = floats / layer.input_gain.to(made)
        fits = _rounds_to(layer, floats, rows, made[rows])
        made[rows] = torch.where(fits, floats, made[rows])
        count += int(fits.sum())
    return made, count


@torch.no_grad()
def stored(layer: Quantized) -> int:
    """Make a layer's integers those nearest to its master weight; return how many are others than before."""
    assert layer.master is not None, "only while masters train"
    changed = 0
    for rows in chunks(layer.master):
        before = layer.stored_rows(rows.start, rows.stop)
        layer.store_rows(layer.master[rows], rows)
        changed += int((layer.stored_rows(rows.start, rows.stop) != before).sum())
    return changed


def _rounds_to(layer: Quantized, floats: Tensor, rows: slice, wanted: Tensor) -> Tensor:
    """Return which of `floats` are rounded to what is `wanted`, bit for bit, and lie inside the grid: where gradients pass."""
    with torch.enable_grad():
        leaf = floats.detach().requires_grad_()
        rounded = layer.rounded(leaf, rows)
        (passes,) = torch.autograd.grad(rounded.sum(), leaf)
    # Bits, since E4M3 has a negative zero.
    return (rounded.detach().view(torch.int32) == wanted.view(torch.int32)) & (passes > 0)
