"""Fewer tokens at once: which of N go on, alone or as means, as M rows.

Every method returns an assignment (B, M, N), or (M, N) where the tokens do not matter, whose rows sum to 1: a kept token's row has
a single 1, a merged one's the shares of its members. Rows stand in the order of the tokens, a merged one at its members' mean
place, because a language model reads them in a row.

Only comparisons, reductions, matmuls and the values of one top-k, with M static: exporters need no scatter and no loop over data.
Ties go to the earlier token in every runtime alike.

Sources, with the deliberate differences:

- `spread_farthest`: DivPrune, arXiv 2503.02175 (max-min cosine distance, greedy), in order of the tokens.
- `best_scored`: the top M by a score, such as the attention of the class token in EViT, arXiv 2202.07800.
- `least_redundant`: the spatial half of LFTR, arXiv 2501.17391, whose code is not public: this is our reading of the abstract.
- `dominant_and_contextual`: VisionZip, arXiv 2412.04467. The contextual tokens are means of what goes into them;
  the official code adds the mean to the target, which doubles its length.
- `kept_with_neighbours`: LLaVA-PruMerge, arXiv 2403.15388, with M given instead of counted by outliers. Means weighted
  by score; the official code adds sums. Its further token for all that is left is one of the M.
- `clustered`: Token Sequence Compression, arXiv 2504.17892 (k-means of normalised tokens, means of the tokens as they are), begun
  from `spread_farthest` instead of at random, so that it is the same every time.
- `halved`: ToMe's bipartite matching (`matching`) again and again until M are left.

Shapes: B batch, N tokens, M kept, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.matching import bipartite_soft_matching
from mmcompress.ops.merging import merge
from mmcompress.ops.ranks import FAR, TINY, directions, rank, rows_of

LLOYD = 5
"""Iterations of k-means; centres that begin far apart move little after them."""
NEIGHBOURS = 32
"""Tokens that go into a kept one in PruMerge."""
MARGIN = 1e-3
"""Less than any difference of two means of places that matters."""
DOMINANT = 54 / 64
"""Share of the tokens that VisionZip keeps as they are (54 of 64, 108 of 128, 162 of 192)."""


def evenly(tokens: int, kept: int) -> Tensor:
    """Return (M, N): tokens at equal distances, the middle of each stretch."""
    _require(tokens, kept)
    places = ((torch.arange(kept) + 0.5) * tokens / kept).long()
    return standing_at(places, tokens)


def drawn(tokens: int, kept: int, generator: torch.Generator) -> Tensor:
    """Return the places (M,) of M tokens drawn without return, in order; the control."""
    _require(tokens, kept)
    return torch.randperm(tokens, generator=generator)[:kept].sort().values


def standing_at(places: Tensor, tokens: int) -> Tensor:
    """Return (M, N): the tokens at `places` (M,)."""
    return (places[:, None] == torch.arange(tokens, device=places.device)).float()


def pooled(grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """Return (M, N): the means of a grid's cells, row by row. `grid` (rows, columns), N = rows * columns; `small` likewise, M.

    Cells are those of adaptive average pooling: they cover the grid, and overlap where sizes do not divide.
    """
    for large, few in zip(grid, small, strict=True):
        _require(large, few)
    rows, columns = (_cells(large, few) for large, few in zip(grid, small, strict=True))
    return torch.kron(rows, columns)


def _cells(large: int, few: int) -> Tensor:
    place, cell = torch.arange(large), torch.arange(few)[:, None]
    inside = (place >= cell * large // few) & (place < -((-(cell + 1) * large) // few))
    return inside / inside.sum(dim=1, keepdim=True)


def best_scored(scores: Tensor, kept: int) -> Tensor:
    """Return (B, M, N): the M tokens with the best `scores` (B, N)."""
    _require(scores.shape[1], kept)
    return rows_of(rank(scores) < kept, kept)


def least_redundant(tokens: Tensor, kept: int) -> Tensor:
    """Return (B, M, N): the M tokens that are least like all others, by the mean cosine. `tokens`: (B, N, C)."""
    unit = directions(tokens)
    return best_scored(-(unit @ unit.mean(dim=1)[:, :, None])[..., 0], kept)


def spread_farthest(tokens: Tensor, kept: int) -> Tensor:
    """Return (B, M, N): M tokens, each as far as can be from the nearest chosen before it, by the cosine. `tokens`: (B, N, C)."""
    return rows_of(_farthest(tokens, kept), kept)


def _farthest(tokens: Tensor, kept: int) -> Tensor:
    """Return whether each token is chosen, (B, N)."""
    count = tokens.shape[1]
    _require(count, kept)
    unit = directions(tokens)
    distance = 1 - unit @ unit.mT  # (B, N, N)
    own = torch.eye(count, dtype=torch.bool, device=tokens.device)
    nearest = distance.masked_fill(own, FAR).amin(dim=-1)  # the first is farthest from all
    chosen = torch.zeros_like(nearest, dtype=torch.bool)
    number = torch.arange(count, device=tokens.device)
    for step in range(kept):
        newest = number == nearest.masked_fill(chosen, -FAR).argmax(dim=-1, keepdim=True)
        chosen = chosen | newest
        reach = (newest.to(distance.dtype)[:, None, :] @ distance)[:, 0]  # (B, N)
        nearest = reach if step == 0 else torch.minimum(nearest, reach)
    return chosen


def clustered(tokens: Tensor, kept: int) -> Tensor:
    """Return (B, M, N): means of M clusters of `tokens` (B, N, C)."""
    unit = directions(tokens)
    centres = spread_farthest(tokens, kept).to(unit.dtype) @ unit
    for _ in range(LLOYD):
        shares = _shares(_nearest(unit, centres))
        # A centre that lost all its members stays where it was.
        centres = torch.where(shares.sum(dim=-1, keepdim=True) > 0, directions(shares @ unit), centres)
    shares = _shares(_nearest(unit, centres))
    alone = _nearest(centres, unit).mT  # (B, M, N): what an empty cluster gives out, its nearest token
    return _in_order(torch.where(shares.sum(dim=-1, keepdim=True) > 0, shares, alone))


def dominant_and_contextual(scores: Tensor, features: Tensor, kept: int) -> Tensor:
    """Return (B, M, N): most tokens are the best by `scores` (B, N), the rest means of what is left, alike by `features` (B, N, C).

    Dominant tokens stand first, as in VisionZip; then the contextual ones, whose middles lie at equal distances among the others.
    """
    count = features.shape[1]
    _require(count, kept)
    dominant = dominant_of(kept) if kept < count else kept
    contextual = kept - dominant
    best = rank(scores) < dominant
    first = rows_of(best, dominant)
    if not contextual:
        return first
    rest = rows_of(~best, count - dominant)  # (B, N - dominant, N)
    unit = directions(rest @ directions(features))
    middle = evenly(count - dominant, contextual).to(unit)  # (contextual, N - dominant)
    nearest = _nearest(unit, middle @ unit)
    # A middle goes into its own cluster, however alike another is.
    nearest = torch.where(middle.any(dim=0)[None, None, :], middle, nearest)
    return torch.cat([first, _shares(nearest) @ rest], dim=1)


def dominant_of(kept: int) -> int:
    """Return how many of M tokens stay as they are in `dominant_and_contextual`."""
    return max(1, round(kept * DOMINANT))


def kept_with_neighbours(scores: Tensor, features: Tensor, kept: int) -> Tensor:
    """Return (B, M, N): M - 1 tokens, best by `scores` (B, N), with neighbours by `features` (B, N, C), and the rest as one.

    Members weigh by score, so the kept one most. Scores must not be negative.
    """
    count = features.shape[1]
    _require(count, kept)
    if kept == count:
        return rows_of(torch.ones_like(scores, dtype=torch.bool), kept)
    best = rank(scores) < kept - 1
    weight = scores.to(torch.float32)[:, None, :] + TINY
    rest = _shares((~best).to(weight.dtype)[:, None, :] * weight)
    if kept == 1:
        return rest
    own = rows_of(best, kept - 1)  # (B, M - 1, N)
    unit = directions(features)
    alike = (own @ unit) @ unit.mT
    limit = alike.masked_fill(own > 0, FAR).topk(min(NEIGHBOURS + 1, count), dim=-1).values[..., -1:]
    members = (alike >= limit) & ~best[:, None, :] | (own > 0)
    shares = torch.where(members, weight, 0.0)
    return torch.cat([_in_order(_shares(shares)), rest], dim=1)


def halved(tokens: Tensor, kept: int) -> Tensor:
    """Return (B, M, N): similar pairs of `tokens` (B, N, C) become one, at most half of all at a time, until M are left."""
    _require(tokens.shape[1], kept)
    sizes: Tensor | None = None
    members: Tensor | None = None
    while (count := tokens.shape[1]) > kept:
        assignment = bipartite_soft_matching(tokens, min(count - kept, count // 2))
        tokens, sizes = merge(tokens, assignment, sizes)
        members = assignment if members is None else assignment @ members
    if members is None:
        return rows_of(torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), kept)
    return _in_order(_shares(members))


def by_place(rows: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the rows (…, M, N) of an assignment in the order of their places, and these (…, M, 1).

    A row's place, counted row by row of the `grid`, is that nearest to the middle of what it is made of.
    """
    shares = _shares(rows)
    number = torch.arange(rows.shape[-1], device=rows.device)
    across = grid[1]
    # As sums: see `_in_order`. Halves go up and left, by a margin that rounding does not reach.
    row, column = (
        ((shares * line.to(shares.dtype)).sum(dim=-1) - 0.5 - MARGIN).ceil()
        for line in (number // across, number % across)
    )
    place = row * across + column  # (…, M)
    order = (rank(-place)[..., None, :] == torch.arange(rows.shape[-2], device=rows.device)[:, None]).to(rows.dtype)
    return order @ rows, order @ place[..., None]


def places(assignment: Tensor, tokens: Tensor) -> Tensor:
    """Return (B, N, M) whose rows sum to 1 and that puts rows of an `assignment` (B, M, N) back in the places of their members.

    A place that went into none gets the row most alike to what stood there. `tokens`: (B, N, C), what was there before.
    """
    assignment = assignment.expand(tokens.shape[0], -1, -1)
    unit = directions(tokens)
    members = (assignment > 0).to(unit.dtype).mT  # (B, N, M)
    alike = _nearest(unit, directions(assignment.to(unit.dtype) @ unit)).mT
    members = torch.where(members.any(dim=-1, keepdim=True), members, alike)
    return members / members.sum(dim=-1, keepdim=True)


def _require(tokens: int, kept: int) -> None:
    if not 1 <= kept <= tokens:
        raise UsageError(f"cannot keep {kept} of {tokens} tokens", hint=f"keep 1 to {tokens}")


def _nearest(tokens: Tensor, centres: Tensor) -> Tensor:
    """Return (B, M, N) of 0s and 1s: the centre (B, M, C) each of the unit `tokens` (B, N, C) is most alike."""
    closest = (tokens @ centres.mT).argmax(dim=-1)  # (B, N)
    rows = torch.arange(centres.shape[1], device=tokens.device)[:, None]
    return (closest[:, None, :] == rows).to(tokens.dtype)


def _shares(weights: Tensor) -> Tensor:
    """Return rows (B, M, N) that sum to 1, or are 0 throughout."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=TINY)


def _in_order(rows: Tensor) -> Tensor:
    """Return the rows (B, M, N) ordered by the mean place of their members."""
    places = torch.arange(rows.shape[-1], device=rows.device).to(rows.dtype)
    number = rank(-(rows * places).sum(dim=-1))  # (B, M); as a matmul OpenVINO (2026.4) fuses it wrongly
    order = number[:, None, :] == torch.arange(rows.shape[1], device=rows.device)[:, None]
    return order.to(rows.dtype) @ rows
