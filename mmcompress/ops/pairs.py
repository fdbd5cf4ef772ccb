"""How alike the pairs are that a method would merge: one falling row of similarities, the most alike pair first.

Where a row's k-th number is s, the method can merge k pairs before one is less alike than s. Methods that do not merge in the order
of similarity (PiToMe by energy, CrossGET by importance beside it) may take a less alike pair early: all behind it then count as no
more alike than that. Similarities are the cosines of the method's own matching:

- `matching.bipartite_soft_matching`: each even token's with its most similar odd one;
- `complete_matching.energy_matching`: a source's with the best of the destinations taken up to then; more of them make it better;
- `complete_matching.guided_matching`: a token's with the most similar one ranked behind it, which it is ranked by. If that one goes
  as well, it goes into the next best.

Protected tokens and padding (size 0) are in no pair.

`mean_amounts` and `amounts_for_almost_all` make of such rows how many pairs each block should merge.

Shapes: B batch, N tokens, P protected, D key width, K = (N - P) // 2, U = N - P, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.ops.complete_matching import NEVER, costs, energies
from mmcompress.ops.matching import pair_similarity
from mmcompress.ops.outliers import available
from mmcompress.ops.ranks import directions, rank
from mmcompress.ops.schedule import Amounts, largest_merge

BEYOND = 1.001
"""Above the cosine of a token with itself, rounding errors included."""


def bipartite_pairs(keys: Tensor, protected: int = 0, sizes: Tensor | None = None) -> Tensor:
    """Return (B, K). `keys`: (B, N, D); `sizes`: (B, N), needed only where some are padding."""
    pairs = largest_merge(keys.shape[1], protected)
    if not pairs:
        return keys.new_zeros(len(keys), 0)
    similarity, ends = pair_similarity(directions(keys), protected, sizes)
    best = similarity.amax(dim=-1)  # (B, Na)
    if ends is not None:
        best = torch.where(ends, NEVER, best)
    return best.sort(dim=-1, descending=True).values[:, :pairs]


def energy_pairs(keys: Tensor, protected: int = 0, margin: float = 0.9, sizes: Tensor | None = None) -> Tensor:
    """Return (B, K). `keys`: (B, N, D); `sizes`: (B, N), needed only where some are padding; `margin`: PiToMe's."""
    pairs = largest_merge(keys.shape[1], protected)
    if not pairs:
        return keys.new_zeros(len(keys), 0)
    unit = directions(keys[:, protected:])
    valid = _valid(unit, protected, sizes)
    similarity = unit @ unit.mT
    order = rank(torch.where(valid > 0, energies(similarity, margin, valid), NEVER)).argsort(dim=-1)  # (B, U)
    sources, destinations = order[:, : 2 * pairs : 2], order[:, 1 : 2 * pairs : 2]
    count = unit.shape[1]
    rows = similarity.gather(1, sources[:, :, None].expand(-1, -1, count))
    between = rows.gather(2, destinations[:, None, :].expand(-1, pairs, -1))  # (B, K, K)
    later = torch.ones(pairs, pairs, dtype=torch.bool, device=keys.device).triu(1)
    real = valid.gather(1, destinations)[:, None, :] * valid.gather(1, sources)[:, :, None]
    return between.masked_fill(later | (real == 0), NEVER).amax(dim=-1).cummin(dim=-1).values


def guided_pairs(keys: Tensor, protected: int = 0, sizes: Tensor | None = None) -> Tensor:
    """Return (B, K). `keys`: (B, N, D); `sizes`: (B, N), needed only where some are padding."""
    pairs = largest_merge(keys.shape[1], protected)
    if not pairs:
        return keys.new_zeros(len(keys), 0)
    every = directions(keys)
    valid = _valid(every[:, protected:], protected, sizes)
    importance, best, _ = costs(every, protected, valid)
    going = rank(torch.where(valid > 0, best - importance, 2 * NEVER)).argsort(dim=-1)  # (B, U)
    return torch.where(valid > 0, best, NEVER).gather(1, going)[:, :pairs].cummin(dim=-1).values


def _valid(unit: Tensor, protected: int, sizes: Tensor | None) -> Tensor:
    return torch.ones_like(unit[..., 0]) if sizes is None else (sizes[:, protected:] > 0).to(unit.dtype)


def mean_amounts(pairs: Sequence[Tensor]) -> Amounts:
    """Return how many pairs each block should merge at a scale: those at least BEYOND - scale alike, on the mean of the samples.

    `pairs`: for each block, (S, K); K = 0 where none may be merged.
    """

    def amounts(scale: float) -> list[float]:
        return [float((block >= BEYOND - scale).sum()) / max(1, len(block)) for block in pairs]

    return amounts


def amounts_for_almost_all(pairs: Sequence[Tensor], similarity: float) -> list[int]:
    """Return how many pairs of each block are at least this alike in 95 of 100 samples. `pairs`: for each block, (S, K)."""
    return [int(available((block >= similarity).sum(dim=-1).tolist())) for block in pairs]
