"""Which tokens to merge: bipartite soft matching.

Unprotected tokens are split by position, even ones into A and odd ones into B. Every A token finds its most similar B token by the
cosine of their attention keys; the R tokens of A with the best similarities are merged into their partners. The result is an
assignment matrix, one row per token that is left, one column per token there was, 1 where the column went into the row.

Source: ToMe (Token Merging), arXiv 2210.09461, section 3 and appendix D. Deliberate differences:

- Protected tokens (class, registers) are on neither side: they are no source, and nothing merges into them. For a single class
  token at position 0 this is what ToMe does, since position 0 is even.
- Ties are broken by position. Blank image regions give many equal similarities, and an unstable sort would make the result depend
  on the runtime. Ranks are therefore counted with comparisons, which every runtime computes alike, instead of sorted.
- Tokens of A that stay keep their order in every case, not only when there is a class token.
- Padding (size 0) merges first, into anything, and never attracts a token.

Everything is comparisons, reductions and one small matmul, with R static, so that exporters need neither sort nor scatter.

Shapes: B batch, N tokens, R merged, P protected, D key width, Na and Nb the sizes of the two sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.schedule import largest_merge

FAR = 4.0
"""Beyond any cosine: what is added to or taken from similarities of padding."""


def bipartite_soft_matching(keys: Tensor, merged: int, protected: int = 0, sizes: Tensor | None = None) -> Tensor:
    """Return the assignment (B, N - R, N) of 0s and 1s, in the dtype of `keys`; every column holds a single 1.

    `keys`: (B, N, D), any scale. `sizes`: (B, N), tokens each one stands for; needed only where some are padding (0).
    Rows are the protected tokens, then what is left of A, then B. No gradient flows into `keys`.
    Raises UsageError when R exceeds half of the unprotected tokens.
    """
    tokens = keys.shape[1]
    if not 0 <= merged <= largest_merge(tokens, protected):
        raise UsageError(
            f"cannot merge {merged} of {tokens} tokens with {protected} protected; "
            f"the limit is {largest_merge(tokens, protected)}",
            hint="merge fewer tokens, or give larger images",
        )
    first_a, first_b = protected + protected % 2, protected + 1 - protected % 2
    unit = torch.nn.functional.normalize(keys.detach(), dim=-1)
    similarity = unit[:, first_a::2] @ unit[:, first_b::2].mT  # (B, Na, Nb)
    if sizes is not None:
        similarity = similarity - FAR * (sizes[:, None, first_b::2] == 0).to(similarity.dtype)
    best, partner = similarity.max(dim=-1)  # (B, Na)
    if sizes is not None:
        best = torch.where(sizes[:, first_a::2] == 0, FAR, best)

    target = _targets(best, partner, merged)  # (B, Na), rows counted after the protected ones
    count_a = best.shape[1]
    positions = torch.arange(tokens, device=keys.device)
    is_a = (positions >= protected) & (positions % 2 == 0)
    index_a = ((positions - first_a) // 2).clamp(0, count_a - 1)
    row_b = protected + count_a - merged + (positions - first_b) // 2
    stays = torch.where(positions < protected, positions, row_b)
    rows = torch.where(is_a, target.index_select(1, index_a) + protected, stays)  # (B, N)
    return (rows[:, None, :] == torch.arange(tokens - merged, device=keys.device)[:, None]).to(keys.dtype)


def _targets(best: Tensor, partner: Tensor, merged: int) -> Tensor:
    """Return the row (B, Na) of every A token: its place among those that stay, or its partner's row behind them."""
    count = best.shape[1]
    order = torch.arange(count, device=best.device)
    earlier = order[None, :] < order[:, None]  # [i, j]: j comes before i
    mine, other = best[:, :, None], best[:, None, :]
    rank = ((other > mine) | ((other == mine) & earlier)).sum(dim=-1)
    stays = rank >= merged
    place = (stays[:, None, :] & earlier).sum(dim=-1)
    return torch.where(stays, place, partner + (count - merged))
