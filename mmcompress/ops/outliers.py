"""How many of a picture's scores stand out, and how many suffice for almost all pictures.

- `above_fence`: scores above Q3 + 1.5 (Q3 - Q1), Tukey's fence. Source: LLaVA-PruMerge, arXiv 2403.15388, section 3.2.
- `outliers`: scores whose Local Outlier Factor is above 1.5 (Breunig et al., SIGMOD 2000, with the 10 neighbours and the threshold
  of scikit-learn's "auto"). Source: Recoverable Compression, arXiv 2409.01179, section 3.2. As there, an unusually low score counts
  too: the factor says how many stand out, the scores which are kept. Where several neighbours are equally near, the smaller one is
  taken; like scikit-learn, mean distances are made longer by 1e-10, so that repeated scores do not divide by zero.

Both count in float64: in half precision many scores are equal. Nothing here is part of a graph: numbers are counted beforehand.

Shapes: B pictures, N scores, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REACH = 1.5
"""Of Tukey's fence, in distances between the quartiles."""
NEIGHBOURS = 10
FACTOR = 1.5
"""From which factor on a score is an outlier."""
NEVER_ZERO = 1e-10
"""What mean distances are made longer by."""
ALMOST_ALL = 95
"""In a hundred."""


def above_fence(scores: Tensor) -> Tensor:
    """Return how many (B,) of the `scores` (B, N) lie above Q3 + 1.5 (Q3 - Q1); quartiles are interpolated linearly."""
    wide = scores.double()
    lower, upper = (wide.quantile(share, dim=-1, keepdim=True) for share in (0.25, 0.75))
    return (wide > upper + REACH * (upper - lower)).sum(dim=-1)


def outlier_factors(scores: Tensor) -> Tensor:
    """Return the Local Outlier Factor (N,) of each of the `scores` (N,): near 1 inside, larger where neighbours are denser."""
    count = len(scores)
    neighbours = min(NEIGHBOURS, count - 1)
    if neighbours < 1:
        return torch.ones(count, dtype=torch.float64)
    ordered, places = scores.double().cpu().sort(stable=True)
    # On a line the nearest K are among the K on either side.
    offsets = torch.tensor([*range(-neighbours, 0), *range(1, neighbours + 1)])
    around = torch.arange(count)[:, None] + offsets  # (N, 2 K)
    inside = (around >= 0) & (around < count)
    around = around.clamp(0, count - 1)
    distance = (ordered[around] - ordered[:, None]).abs().masked_fill(~inside, torch.inf)
    distance, nearest = (found[:, :neighbours] for found in distance.sort(dim=-1, stable=True))
    around = around.gather(1, nearest)  # (N, K)
    reach = distance[:, -1]
    density = 1 / (torch.maximum(distance, reach[around]).mean(dim=-1) + NEVER_ZERO)
    factors = torch.empty_like(density)
    factors[places] = density[around].mean(dim=-1) / density
    return factors


def outliers(scores: Tensor) -> int:
    """Return how many of the `scores` (N,) are outliers."""
    return int((outlier_factors(scores) > FACTOR).sum())


def sufficient(needed: Sequence[float], share: int = ALMOST_ALL) -> float:
    """Return the smallest of the numbers `needed` that is enough for `share` in a hundred of them."""
    return sorted(needed)[max(0, -(-share * len(needed) // 100) - 1)]


def available(counts: Sequence[float], share: int = ALMOST_ALL) -> float:
    """Return the largest number that `share` in a hundred of the `counts` reach."""
    return sorted(counts)[(100 - share) * len(counts) // 100]
