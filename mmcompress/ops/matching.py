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

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.ranks import FAR, directions, earlier
from mmcompress.ops.schedule import largest_merge


def bipartite_soft_matching(keys: Tensor, merged: int, protected: int = 0, sizes: Tensor | None = None) -> Tensor:
    """Return the assignment (B, N - R, N) of 0s and 1s, in float32 or float64; every column holds a single 1.

    `keys`: (B, N, D), any scale. `sizes`: (B, N), tokens each one stands for; needed only where some are padding (0).
    Rows are the protected tokens, then what is left of A, then B. No gradient flows into `keys`.
    Raises UsageError when R exceeds half of the unprotected tokens.
    """
    tokens = keys.shape[1]
    require_mergeable(tokens, merged, protected)
    unit = directions(keys.detach())
    similarity, ends = pair_similarity(unit, protected, sizes)
    best, partner = similarity.max(dim=-1)  # (B, Na)
    if ends is not None:
        best = torch.where(ends, FAR, best)

    layout = _layout(tokens, merged, protected, unit)
    target = _targets(best, partner, merged, layout.earlier)  # (B, Na)
    rows = torch.where(layout.is_a, target.index_select(1, layout.index_a), layout.fixed)  # (B, N)
    return (rows[:, None, :] == layout.numbers).to(unit.dtype)


def pair_similarity(unit: Tensor, protected: int, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the cosines (B, Na, Nb) of A's tokens with B's, and where A is padding (B, Na), None where nothing is.

    `unit`: (B, N, D), of length 1. Padding in B is farther away than anything.
    """
    first_a, first_b = _first(protected)
    similarity = unit[:, first_a::2] @ unit[:, first_b::2].mT
    if sizes is None:
        return similarity, None
    similarity = similarity - FAR * (sizes[:, None, first_b::2] == 0).to(similarity.dtype)
    return similarity, sizes[:, first_a::2] == 0


def require_mergeable(tokens: int, merged: int, protected: int) -> None:
    """Raise UsageError when more than half of the unprotected tokens are to merge."""
    limit = largest_merge(tokens, protected)
    if not 0 <= merged <= limit:
        raise UsageError(
            f"cannot merge {merged} of {tokens} tokens with {protected} protected; the limit is {limit}",
            hint="merge fewer tokens, or give larger images",
        )


def _targets(best: Tensor, partner: Tensor, merged: int, before: Tensor) -> Tensor:
    """Return the row (B, Na) of every A token: its place among those that stay, or its partner's row behind them."""
    mine, other = best[:, :, None], best[:, None, :]
    rank = ((other > mine) | ((other == mine) & before)).sum(dim=-1)
    stays = rank >= merged
    place = (stays[:, None, :] & before).sum(dim=-1)
    return torch.where(stays, place, partner + (best.shape[1] - merged))


class Layout(NamedTuple):
    """What depends on N, R and P alone. Rows are counted from the first unprotected one, so protected ones are negative."""

    is_a: Tensor
    """(N,) bool."""
    index_a: Tensor
    """(N,): the place of an A token within A; anything for others."""
    fixed: Tensor
    """(N,): the row of tokens that never move; anything for A tokens."""
    numbers: Tensor
    """(N - R, 1): the rows' numbers."""
    earlier: Tensor
    """(Na, Na) bool: [i, j] says that j comes before i."""


def _layout(tokens: int, merged: int, protected: int, like: Tensor) -> Layout:
    """Return the layout on the device of `like`, remembered between calls: at batch 1 making it costs more than matching.

    While a graph is traced nothing is remembered, because the tensors of a trace must not outlive it.
    """
    if type(like) is not Tensor or torch.compiler.is_compiling():
        return _make_layout(tokens, merged, protected, like.device)
    return _remembered_layout(tokens, merged, protected, like.device)


def _make_layout(tokens: int, merged: int, protected: int, device: torch.device) -> Layout:
    first_a, first_b = _first(protected)
    count_a = len(range(first_a, tokens, 2))
    position = torch.arange(tokens, device=device)
    row_b = count_a - merged + (position - first_b) // 2
    return Layout(
        is_a=(position >= protected) & (position % 2 == 0),
        index_a=((position - first_a) // 2).clamp(0, count_a - 1),
        fixed=torch.where(position < protected, position - protected, row_b),
        numbers=torch.arange(-protected, tokens - merged - protected, device=device)[:, None],
        earlier=earlier(count_a, device),
    )


@functools.lru_cache(maxsize=256)
def _remembered_layout(tokens: int, merged: int, protected: int, device: torch.device) -> Layout:
    with torch.inference_mode(False):
        return _make_layout(tokens, merged, protected, device)


def _first(protected: int) -> tuple[int, int]:
    """Return the first position of A (even) and of B (odd)."""
    return protected + protected % 2, protected + 1 - protected % 2
