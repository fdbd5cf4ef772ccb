"""Order without sorting: ranks are counted with comparisons, which every runtime computes alike and which need no scatter.

Shapes: B batch, N tokens, M rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-6
"""Vectors shorter than this count as pointing nowhere (float16 keeps it above 0)."""
FAR = 4.0
"""Beyond any cosine and any difference of two."""


def directions(tokens: Tensor) -> Tensor:
    """Return tokens (…, C) of length 1, at least in float32."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return tokens / tokens.norm(dim=-1, keepdim=True).clamp(min=TINY)


def earlier(count: int, device: torch.device) -> Tensor:
    """Return (N, N) bool: [i, j] says that j comes before i."""
    order = torch.arange(count, device=device)
    return order[None, :] < order[:, None]


def rank(scores: Tensor) -> Tensor:
    """Return each score's place (…, N) among the others, the best 0; of equal ones the earlier is better."""
    mine, other = scores[..., :, None], scores[..., None, :]
    better = (other > mine) | ((other == mine) & earlier(scores.shape[-1], scores.device))
    return better.sum(dim=-1)


def number_of(chosen: Tensor) -> Tensor:
    """Return how many tokens before each one (B, N) are among the `chosen` (B, N)."""
    return (chosen[:, None, :] & earlier(chosen.shape[1], chosen.device)).sum(dim=-1)


def rows_of(chosen: Tensor, kept: int) -> Tensor:
    """Return (B, M, N) of 0s and 1s: the M tokens where `chosen` (B, N) is true, in order."""
    rows = torch.arange(kept, device=chosen.device)[:, None]
    return ((number_of(chosen)[:, None, :] == rows) & chosen[:, None, :]).float()
