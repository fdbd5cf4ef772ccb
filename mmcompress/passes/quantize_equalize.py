"""Gains that equalize the ranges of two Linears (`ops.equalization`), wherever rows of one make the channels that the other reads.

The reader's columns are divided by the gain before they are rounded; the maker's rows take it over as those of AWQ do
(`quantize_folds`). Only weights are looked at, of two layers at a time, whether in memory or streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.equalization import equalizing_gains
from mmcompress.passes.base import Plan
from mmcompress.passes.quantize_channels import Channels, maker_of
from mmcompress.passes.quantize_layers import candidates
from mmcompress.passes.quantize_schemes import WEIGHTS_ALONE, with_activations
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize

STRENGTH = 0.5
"""The power of both ranges in a gain, which the plan notes as that of AWQ's scales."""


def add_equalized(settings: Quantize, bundle: Bundle, tower: Tower, schemes: Mapping[str, str], made: Plan) -> None:
    """Add to `made` the gains of those layers of `schemes`, of weights alone, whose input rows of another Linear make."""
    paths = [path for path, scheme in schemes.items() if scheme in WEIGHTS_ALONE]
    for reader, channels in _pairs(settings, bundle, tower, paths).items():
        rows = channels.of_rows(_range(bundle, maker_of(bundle, channels), dim=1))
        columns = channels.once(_range(bundle, reader, dim=0), partial(torch.amax, dim=1))
        made.tensors[f"{reader}.gain"] = equalizing_gains(rows, columns)
        made.decisions["scaled"][reader] = STRENGTH


def equalizes(settings: Quantize, bundle: Bundle, towers: Iterable[Tower]) -> bool:
    """Whether any layer of `towers` will be equalized with the one that makes its input."""
    for tower in towers:
        name = settings.scheme_of(tower.name)
        if name in WEIGHTS_ALONE and with_activations(name, settings.activations).inputs != "static":
            paths = candidates(bundle, tower, settings.tables, settings.keep_float)
            if _pairs(settings, bundle, tower, paths):
                return True
    return False


def _pairs(settings: Quantize, bundle: Bundle, tower: Tower, paths: Iterable[str]) -> dict[str, Channels]:
    """Return reader -> the rows that make its input, where both are Linears and the reader is one of `paths`."""
    return {
        reader: channels
        for reader, channels in settings.channels(tower).items()
        if reader in paths
        and all(isinstance(bundle.module(path), nn.Linear) for path in (reader, maker_of(bundle, channels)))
    }


def _range(bundle: Bundle, path: str, dim: int) -> Tensor:
    """Return the largest |w| of each of a Linear's rows (dim 1) or columns (dim 0)."""
    weight: Tensor = bundle.layer(path).get_parameter("weight").detach()
    return weight.abs().amax(dim).float()
