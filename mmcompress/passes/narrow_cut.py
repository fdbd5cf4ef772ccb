"""Cutting for `narrow`: structure only, on real or meta tensors; and what it will cost.

Shape alphabet: C channels, K channels left.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch

from mmcompress.bundle import Bundle
from mmcompress.passes.narrow_units import Stream, is_centred
from mmcompress.passes.prune_units import Costs, count_costs
from mmcompress.surgery.deferred import hollow
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.linears import keep_columns, keep_rows
from mmcompress.surgery.narrowing import give_bias, narrow_norm, narrow_rows, with_product


def costs_of_cut(bundle: Bundle, stream: Stream, width: int, tie: Sequence[str]) -> Costs:
    """Return what the tower will cost, counted on a copy without values."""
    values = {id(parameter): hollow(parameter) for parameter in bundle.model.parameters()}
    shell = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model, values))
    cut(shell, stream, width, tie)
    return count_costs(shell, shell.tower(stream.tower))


def cut(bundle: Bundle, stream: Stream, width: int, tie: Sequence[str]) -> None:
    """Make a stream `width` channels wide; `tie`: the table and the output layer that share a weight, if two do."""
    kept = torch.arange(width)
    for path in stream.writers:
        keep_rows(bundle.module(path), kept)  # type: ignore[arg-type]
    scales = (name.rpartition(".")[::2] for name in stream.scales.values())
    for path, name in (*stream.rows, *scales):
        narrow_rows(bundle.module(path), name, width)
    biases = is_centred(bundle, stream)
    for norm, readers in stream.norms.items():
        narrow_norm(bundle.module(norm), width)
        for path in readers:
            linear = bundle.module(path)
            keep_columns(linear, kept)  # type: ignore[arg-type]
            if biases:
                give_bias(linear)  # type: ignore[arg-type]
    if stream.entry:
        bundle.replace(stream.entry, with_product(bundle.module(stream.entry), width))
    if stream.widens:
        bundle.replace(stream.last, with_product(bundle.module(stream.last), stream.width, bias=True))
    if tie:
        table, linear = (bundle.module(path) for path in tie)
        linear.weight = table.weight
        bundle.replace(stream.last, with_product(bundle.module(stream.last), width))
    give_back_freed()
