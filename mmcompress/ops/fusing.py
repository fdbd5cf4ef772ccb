"""Which tokens to merge when nobody compares them: by what was looked at, or by place.

- `fused`: EViT, arXiv 2202.07800. What the class token looks at least becomes one token, the mean weighted by that attention; the
  official code adds instead.
- `coarsened`: Vcc, arXiv 2305.04241, section 4: what VIP tokens look at stays fine, runs of the other tokens become coarse ones.
  Deliberate differences: runs double from block to block, from two tokens on, where the paper's hold 16 at once, and what is
  coarse stays coarse, so nothing has to be remembered to refine it; protected tokens are the VIPs, all tokens where there are none.
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


def coarsened(scores: Tensor, merged: int, protected: int = 0) -> Tensor:
    """Return the assignment (B, N - R, N) of 0s and 1s: of the pairs of neighbours, the R that are looked at least become one each.

    `scores`: (B, N), 0 for padding. A pair is looked at as much as the one of its two that is looked at more.
    Raises UsageError when R exceeds half of the unprotected tokens.
    """
    require_mergeable(scores.shape[1], merged, protected)
    own = scores.detach()[:, protected:]
    pairs = own[:, : own.shape[1] // 2 * 2].unflatten(1, (-1, 2))  # (B, pairs, 2)
    joined = rank(-pairs.amax(dim=-1)) < merged
    stays = torch.stack([torch.ones_like(joined), ~joined], dim=-1).flatten(1)
    before, behind = scores[:, :protected], own[:, stays.shape[1] :]
    stays = torch.cat(
        [torch.ones_like(before, dtype=torch.bool), stays, torch.ones_like(behind, dtype=torch.bool)], dim=1
    )
    # The second of a pair goes into the row of the first, which stays.
    row = number_of(stays) - (~stays).long()
    rows = torch.arange(scores.shape[1] - merged, device=scores.device)[:, None]
    return (row[:, None, :] == rows).to(torch.promote_types(scores.dtype, torch.float32))


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
