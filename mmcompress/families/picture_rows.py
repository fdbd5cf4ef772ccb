"""Pictures in batches: samples with none, with one and with several, each with its own rows.

Shape alphabet: B samples, K pictures of the sample that has most, R pictures of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Return rows of different lengths as one (B, …) tensor, zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def spread(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return rows (R, …), `counts` of them for each sample, as (B, K, …), zeros behind."""
    return padded(rows.split(list(counts)))


def gathered(table: Tensor, counts: Tensor) -> Tensor:
    """Return the rows (R, …) of a `table` (B, K, …): of each sample as many as `counts` (B,) says."""
    return table[torch.arange(table.shape[1], device=table.device) < counts[:, None]]
