"""Which tokens to merge, of all pairs: every token may go into every other, where `matching` pairs even positions with odd ones.

- `energy_matching`: PiToMe, arXiv 2405.16148. Tokens that many others are like have a high energy and are merged among themselves;
  those that stand alone are kept. Deliberate differences: rows keep the order of the tokens instead of that of the energies, and
  means weigh by size, where the official code weighs a chain of two merges wrongly.
- `guided_matching`: CrossGET's complete-graph soft matching, arXiv 2305.17455, section 3.3. A guide says what matters: a cross
  token (see `surgery.cross_tokens`), or else the class token, or the mean where there is none. Of two tokens that are most alike
  to each other only one goes. Members weigh by exp(importance) within the whole group, in the paper only in pairs.

The metric of both is attention keys, as in `matching`, whose treatment of protected tokens and padding holds here too.

Shapes: B batch, N tokens, R merged, P protected, D key width, U = N - P.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmcompress.ops.matching import require_mergeable
from mmcompress.ops.ranks import FAR, directions, number_of, rank

NEVER = -2 * FAR
"""Below every similarity, that of padding included."""


def energy_matching(
    keys: Tensor, merged: int, protected: int = 0, margin: float = 0.9, sizes: Tensor | None = None
) -> Tensor:
    """Return the assignment (B, N - R, N) of 0s and 1s of the 2R tokens with most energy, in pairs of neighbours by energy.

    `keys`: (B, N, D); `sizes`: (B, N), needed only where some are padding (0). `margin`: the cosine from which tokens count as
    alike. Raises UsageError when R exceeds half of the unprotected tokens.
    """
    require_mergeable(keys.shape[1], merged, protected)
    unit = directions(keys.detach()[:, protected:])
    similarity = unit @ unit.mT  # (B, U, U)
    valid = torch.ones_like(similarity[:, 0]) if sizes is None else (sizes[:, protected:] > 0).to(similarity.dtype)
    order = rank(torch.where(valid > 0, energies(similarity, margin, valid), FAR))
    similarity = similarity - FAR * (1 - valid)[:, None, :]
    sources, destinations = ((order < 2 * merged) & (order % 2 == side) for side in (0, 1))
    partner = similarity.masked_fill(~destinations[:, None, :], NEVER).argmax(dim=-1)
    return _joined(sources, partner, merged, protected).to(unit.dtype)


def energies(similarity: Tensor, margin: float, valid: Tensor) -> Tensor:
    """Return how much each token is like all that are `valid` (B, U), of 0s and 1s; `similarity`: (B, U, U), cosines.

    From `margin` on what is more alike counts more; below it falls towards -1.
    """
    near = functional.elu(similarity - margin) * valid[:, None, :]
    return near.sum(dim=-1) / valid.sum(dim=-1, keepdim=True).clamp(min=1)


def guided_matching(
    keys: Tensor, merged: int, protected: int = 0, sizes: Tensor | None = None, guide: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the assignment (B, N - R, N) of 0s and 1s and the weight (B, N) of every token in the mean it goes into.

    `keys`: (B, N, D), where the first is the class token if any is protected. `sizes`: (B, N), needed only where some are padding
    (0). `guide`: (B, 1, D), the key that tokens matter by, where that is no token's. Raises UsageError when R exceeds half of the
    unprotected tokens.
    """
    require_mergeable(keys.shape[1], merged, protected)
    every = directions(keys.detach())
    unit = every[:, protected:]
    valid = torch.ones_like(unit[..., 0]) if sizes is None else (sizes[:, protected:] > 0).to(unit.dtype)
    importance, best, similarity = costs(every, protected, valid, guide)
    sources = rank(torch.where(valid > 0, best - importance, FAR)) < merged
    partner = similarity.masked_fill(sources[:, None, :], NEVER).argmax(dim=-1)
    weights = torch.cat([torch.ones_like(every[:, :protected, 0]), importance.exp()], dim=1)
    return _joined(sources, partner, merged, protected).to(unit.dtype), weights


def costs(every: Tensor, protected: int, valid: Tensor, guide: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return how important each token is (B, U), how like the most similar one behind it (B, U), and all cosines (B, U, U).

    Tokens go in the order of the second minus the first. `every`: (B, N, D), of length 1; `valid`: (B, U), 0 where padding is;
    `guide`: see `guided_matching`.
    """
    unit = every[:, protected:]
    if guide is None:
        guide = every[:, :1] if protected else valid[:, None, :] @ unit
    own = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    similarity = (unit @ unit.mT).masked_fill(own, -FAR) - FAR * (1 - valid)[:, None, :]
    order = rank(similarity.amax(dim=-1))
    # A token asks those behind it alone; the last one has none to ask and never goes.
    behind = order[:, None, :] > order[:, :, None]
    importance = (unit @ directions(guide.detach()).mT)[:, :, 0]
    return importance, similarity.masked_fill(~behind, NEVER).amax(dim=-1), similarity


def _joined(sources: Tensor, partner: Tensor, merged: int, protected: int) -> Tensor:
    """Return (B, N - R, N) bool: every one of the `sources` (B, U) is in the row of its `partner` (B, U); rows in order."""
    count = sources.shape[1]
    number = number_of(~sources)
    row = torch.where(sources, number.gather(1, partner), number) + protected
    alone = torch.arange(protected, device=row.device).expand(row.shape[0], -1)
    rows = torch.arange(protected + count - merged, device=row.device)[:, None]
    return torch.cat([alone, row], dim=1)[:, None, :] == rows
