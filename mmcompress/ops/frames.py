"""Layers of a video that become fewer: which of them go into each one that is left.

A table says for each layer left which three it is made of: the one before, a first and a second. Its mean is that of the first and
the second; a convolution over time of three taps and a step of two looks at all three. Tables stand one behind the other: two of
them leave a quarter. Where a second one is missing the last layer stands in for it, where there is none before, the first. A row
whose three are one and the same says that nothing becomes less there; a still picture has no other.

Only halves are taken, so that the mean of equal layers is that very layer, to the bit.

Shape alphabet: T layers, M layers left, N tokens of a layer, C channels, R layers of several pictures and videos.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BEFORE, FIRST, SECOND = range(3)


def halves(layers: int) -> Tensor:
    """Return the table (M, 3) that makes one layer of two neighbours: M is half of `layers`, rounded up."""
    first = torch.arange(0, layers, 2)
    return torch.stack([(first - 1).clamp(min=0), first, (first + 1).clamp(max=layers - 1)], dim=1)


def picks(layers: int, stride: int, places: Sequence[int]) -> Tensor:
    """Return the table (M, 3) that keeps one of `stride` neighbours as it is.

    `places` say which, group by group, and begin again where there are more groups. The last group may be smaller.
    """
    first = torch.arange(0, layers, stride)
    sizes = (layers - first).clamp(max=stride)
    kept = first + torch.tensor(places)[torch.arange(len(first)) % len(places)] % sizes
    return kept[:, None].expand(-1, 3)


def drawn_places(stride: int, seed: int, count: int = 64) -> tuple[int, ...]:
    """Return `count` places in groups of `stride`, drawn at random; the control."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(stride, (count,), generator=generator).tolist())


def taken(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return before, first and second (M, …) of `rows` (T, …), as a `table` (M, 3) says."""
    table = table.to(rows.device)
    return rows[table[:, BEFORE]], rows[table[:, FIRST]], rows[table[:, SECOND]]


def moves(table: Tensor) -> Tensor:
    """Return (M,): whether something becomes less in a row of a `table` (M, 3)."""
    return table[:, BEFORE] != table[:, SECOND]


def mean_over_time(rows: Tensor, table: Tensor) -> Tensor:
    """Return the means (M, …) of `rows` (T, …)."""
    _, first, second = taken(rows, table)
    return (first + second) / 2


def one_hot(tables: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    """Return tables of several pictures and videos, each with its number of `layers`, as one that is multiplied with: (3, M, R)."""
    offsets = torch.tensor([0, *layers]).cumsum(0)
    joined = torch.cat([table + start for table, start in zip(tables, offsets[:-1], strict=True)])
    return (joined.t()[..., None] == torch.arange(int(offsets[-1]))).float()
