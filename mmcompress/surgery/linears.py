"""Cut rows and columns out of nn.Linear in place, and rows out of convolutions.

Works on meta and on deferred tensors; dtype, device and gradient flags stay. A Linear's weight is (out, in): rows are what it
writes, columns are what it reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcompress.surgery.deferred import is_deferred, select


def keep_rows(layer: nn.Linear | nn.Conv2d, kept: Tensor) -> None:
    """Keep the output channels `kept` (K,) of `layer`: weight (out, in, …) -> (K, in, …), bias (out,) -> (K,)."""
    layer.weight = selected(layer.weight, 0, kept)
    if layer.bias is not None:
        layer.bias = selected(layer.bias, 0, kept)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(kept))


def keep_columns(linear: nn.Linear, kept: Tensor) -> None:
    """Keep the input channels `kept` (K,) of `linear`: weight (out, in) -> (out, K)."""
    linear.weight = selected(linear.weight, 1, kept)
    linear.in_features = len(kept)


def spread(units: Tensor, width: int) -> Tensor:
    """Return the channels of `units` (U,) that are `width` channels wide each: (U * width,)."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def in_every_head(units: Tensor, heads: int, head_dim: int) -> Tensor:
    """Return the channels that are the `units` (U,) of each of `heads` heads, `head_dim` channels wide: (heads * U,)."""
    return (torch.arange(heads, device=units.device)[:, None] * head_dim + units).flatten()


def selected(parameter: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    """Return `parameter` with the entries `kept` (K,) along `dim`."""
    if is_deferred(parameter):
        return select(parameter, dim, kept)
    chosen = parameter.detach().index_select(dim, kept.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)
