"""Weights that are 0 and stay so while everything else trains: masked gradients.

Where a weight's gradient is 0 in every step, so are Adam's moments, and its decay is a multiple of the weight: nothing moves it. So
the training loop need not know.

Integers train as floats (see `surgery.master_weights`). One that is stored as 0 begins as a float that is rounded to 0, and
stays that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from mmcompress.surgery.quantized_base import Quantized

OWN = (".weight", ".master_weight")


@contextmanager
def zeros_kept(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[int]:
    """While active, no gradient reaches what is 0 in the weights of Linears among `parameters`; yield how many those are."""
    handles, count = [], 0
    try:
        for name, parameter in parameters.items():
            path, dot, own = name.rpartition(".")
            layer = model.get_submodule(path) if dot + own in OWN else None
            zero = zeros_of(layer) if layer is not None else None
            if zero is None or not zero.any():
                continue
            count += int(zero.sum())
            handles.append(parameter.register_hook(lambda gradient, zero=zero: gradient.masked_fill(zero, 0)))
        yield count
    finally:
        for handle in handles:
            handle.remove()


def zeros_of(layer: nn.Module) -> Tensor | None:
    """Return which weights of a Linear are 0, (out, in) bool, of a quantized one by its integers; None for other layers."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach() == 0
    if isinstance(layer, Quantized) and hasattr(layer, "in_features"):
        return layer.stored_rows(0, layer.weight_shape[0]) == 0
    return None
