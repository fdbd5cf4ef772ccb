"""Which rows of one Linear make the channels that another one reads, where what lies between is linear in them.

    attention   reader(softmax(q k') v)     a channel of the input is a mixture of one row of the values' Linear
    gated MLP   reader(act(gate) * up)      a channel of the input is a multiple of one row of the second writer
    ReLU MLP    reader(relu(up))            likewise for factors above 0

A gain of the channels can then be given to the rows instead. Where several heads look at the same keys and values (grouped-query
attention), their channels have to share it.

Shape alphabet: C channels, R rows, G heads that share keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.surgery.low_rank import LowRankLinear, factor_paths
from mmcompress.views import Attention, Tower


@dataclass(frozen=True)
class Channels:
    """(heads * width) channels, made of (kv_heads * width) rows."""

    maker: str
    """Path of the Linear."""
    heads: int
    kv_heads: int
    width: int
    first: int = 0
    """The first of those rows."""

    def once(self, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `values` (C,) with one for all channels made of a row, by `reduce`: (kv_heads, G, width) -> (kv_heads, width)."""
        grouped = values.view(self.kv_heads, -1, self.width)
        return reduce(grouped).unsqueeze(1).expand_as(grouped).reshape(-1)

    def of_rows(self, values: Tensor) -> Tensor:
        """Return for each channel (C,) what `values` (R,) has of the row that makes it."""
        own = values[self.first : self.first + self.kv_heads * self.width].view(self.kv_heads, 1, self.width)
        return own.expand(-1, self.heads // self.kv_heads, -1).reshape(-1)

    def factors(self, gain: Tensor, rows: int) -> Tensor:
        """Return what the maker's rows (R,) are multiplied by, of the gain (C,) of what they make."""
        factors = torch.ones(rows, dtype=gain.dtype, device=gain.device)
        own = gain.view(self.kv_heads, -1, self.width)[:, 0].reshape(-1)
        factors[self.first : self.first + len(own)] = own
        return factors


def channels_of(tower: Tower) -> dict[str, Channels]:
    """Return reader -> the rows that make its input, of the tower's attentions and of the feed-forwards where there are such.

    A reader of two factors is there by itself and by the factor that reads; rows are those of the layer as a whole.
    """
    found = {}
    for block in tower.blocks:
        for attention in (block.attention, block.cross):
            if attention is not None:
                found[attention.reader] = _values(attention)
        mlp = block.mlp
        if mlp and (len(mlp.writers) == 2 or mlp.activation == "relu"):
            found[mlp.reader] = Channels(mlp.writers[-1], 1, 1, mlp.neurons)
    return found | {factor_paths(reader)[0]: channels for reader, channels in found.items()}


def maker_of(bundle: Bundle, channels: Channels) -> str:
    """Return the path of the Linear that has the rows: of a layer of two factors, the second."""
    made = isinstance(bundle.module(channels.maker), LowRankLinear)
    return factor_paths(channels.maker)[1] if made else channels.maker


def _values(attention: Attention) -> Channels:
    fused = len(attention.writers) == 1
    first = 2 * attention.heads * attention.head_dim if fused else 0
    return Channels(attention.writers[-1], attention.heads, attention.kv_heads, attention.head_dim, first)
