"""Which tokens to merge when nobody compares them: by what was looked at, or by place.

- `fused`: EViT, arXiv 2202.07800. What the class token looks at least becomes one token, the mean weighted by that attention; the
  official code adds instead.
- `neighbours`: means of tokens that stand side by side, at equal distances: pooling that costs nothing and knows nothing.

Shapes: B batch, N tokens, R merged, P protected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.matching import require_mergeable
from mmcompress.ops.ranks import TINY, number_of, rank
from mmcompress.ops.token_choice import evenly


def fused(scores: Tensor, merged: int, protected: int = 0) -> tuple[Tensor, Tensor]:
    """Return the assignment (B, N - R, N) of 0s and 1s and the weight (B, N) of every token in the mean it goes into.

    `scores`: (B, N), not negative, 0 for padding. The R + 1 lowest become the last row; R = 0 merges nothing.
    Raises UsageError when R exceeds half of the unprotected tokens.
    """
    tokens = scores.shape[1]
    require_mergeable(tokens, merged, protected)
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    own = scores[:, protected:]
    sources = rank(own) >= own.shape[1] - merged - 1 if merged else torch.zeros_like(own, dtype=torch.bool)
    stays = torch.cat([torch.ones_like(scores[:, :protected], dtype=torch.bool), ~sources], dim=1)
    row = torch.where(stays, number_of(stays), tokens - merged - 1)
    rows = torch.arange(tokens - merged, device=scores.device)[:, None]
    return (row[:, None, :] == rows).to(scores.dtype), scores + TINY


def neighbours(tokens: int, merged: int, protected: int = 0) -> Tensor:
    """Return the assignment (N - R, N) of 0s and 1s: R of the pairs of neighbours, at equal distances, become one.

    Raises UsageError when R exceeds half of the unprotected tokens.
    """
    require_mergeable(tokens, merged, protected)
    pairs = (tokens - protected) // 2
    second = torch.zeros(tokens, dtype=torch.bool)
    if merged:
        second[protected + 1 : protected + 2 * pairs : 2] = evenly(pairs, merged).any(dim=0)
    row = (~second).cumsum(0) - 1
    return (row == torch.arange(tokens - merged)[:, None]).float()
