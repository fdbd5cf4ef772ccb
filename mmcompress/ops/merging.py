"""Merging tokens by an assignment matrix, and taking the merge back.

An assignment (B, M, N) of 0s and 1s says which of N tokens went into which of M (see `matching`). Merged tokens are means weighted
by size, where a token's size is the number of original tokens it stands for. One matmul does it: TensorRT rejects scatter
reductions, and a one-hot matmul gives the same sums.

A token of size s must weigh s times in every softmax over tokens: `log_size_bias` is added to the attention logits. Then m equal
tokens and one token of size m give the same attention output. Padding is a token of size 0.

Source: ToMe, arXiv 2210.09461, section 3 (proportional attention).
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDING_BIAS = -30000.0
"""Logit of a padded key: exp() of it is 0 in every dtype, it fits float16, and unlike -inf it never makes a NaN."""
NOTHING = 1e-20
"""Less than any weight."""


def merge(
    tokens: Tensor, assignment: Tensor, sizes: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the means (B, M, C) and their sizes (B, M).

    `tokens`: (B, N, C). `assignment`: (B, M, N). `sizes`: (B, N), None when every token has size 1. `weights`: (B, N), above 0,
    how much a token counts in the mean beside its size; None: all alike. A group of padding only becomes zeros of size 0. A token
    merged with nothing is returned bit by bit.
    """
    sized = assignment if sizes is None else assignment * sizes[:, None, :]
    total = sized.sum(dim=-1)  # (B, M)
    weighted = sized if weights is None else sized * weights[:, None, :]
    shares = weighted / weighted.sum(dim=-1, keepdim=True).clamp(min=NOTHING)
    return shares.to(tokens.dtype) @ tokens, total


def unmerge(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Return (B, N, C): every original token gets the mean it went into. `tokens`: (B, M, C), `assignment`: (B, M, N)."""
    return assignment.mT.to(tokens.dtype) @ tokens


def log_size_bias(sizes: Tensor, dtype: torch.dtype, *, padded: bool, proportional: bool = True) -> Tensor:
    """Return the bias (B, N) to add to the attention logits of the keys.

    `padded` says whether sizes can be 0. Without `proportional` only padding is hidden.
    """
    bias = sizes.clamp(min=1).log() if proportional else torch.zeros_like(sizes)
    if padded:
        bias = torch.where(sizes > 0, bias, PADDING_BIAS)
    return bias.to(dtype)
