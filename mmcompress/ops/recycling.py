"""Of the tokens that leave, the best are not lost but come back as a few means.

Source: SparseVLM, arXiv 2410.04417, section 3.3 ("token recycling"), whose clusters are those of DPC-kNN (Du, Ding and Jia,
Knowledge-Based Systems 2016): a token is a centre that lies densely among its nearest neighbours and far from any denser token.

Deliberate differences: how many come back is part of how many are kept, so that methods are compared at equal numbers; it is
counted from those that leave in the end, not from those that would without it. No noise is added to break ties: the earlier token
wins. A mean stands at its centre's place, where the official code appends it to the others.

Rows of a batch hold different numbers of image tokens, and of a further token none. Comparisons, sums and matmuls alone.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.ranks import earlier, rank

SHARE = 0.3
"""Of the tokens that leave, how many are worth coming back."""
EACH = 10
"""How many of these become one."""
NEIGHBOURS = 5
"""Whose distances say how densely a token lies."""
NEVER = torch.finfo(torch.float32).max


def counts_recycled(images: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tokens are clustered, and into how many, where of `images` (B,) tokens `kept` (B,) stay, these included."""
    pool = ((images - kept) * SHARE).floor().to(images.dtype)
    centres = torch.minimum(torch.where(pool > 0, pool // EACH + 1, 0), (kept - 1).clamp(min=0))
    return torch.where(centres > 0, torch.maximum(pool, centres), 0), centres


def recycled(tokens: Tensor, image: Tensor, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores (B, N), 1 for the image tokens that stay and 0 for others, and of what each token is made (B, N, N).

    Rows of the latter sum to 1: those of centres are means of their clusters, all others their own. `tokens`: (B, N, C); `image`:
    (B, N) booleans; `scores`: (B, N), of which the best stay; `kept`: (B,), how many do, centres included.
    """
    pool_size, centres = counts_recycled(image.sum(dim=-1), kept)
    place = rank(scores.float().masked_fill(~image, -NEVER))
    plain = image & (place < (kept - centres)[:, None])
    pool = image & ~plain & (place < (kept - centres + pool_size)[:, None])
    distance = _squared_distances(tokens.float())
    centre = pool & (rank(density_peaks(distance, pool).masked_fill(~pool, -NEVER)) < centres[:, None])
    nearest = distance.masked_fill(~centre[:, None, :], NEVER).argmin(dim=-1)  # (B, N)
    number = torch.arange(tokens.shape[1], device=tokens.device)
    # A centre is nearest to itself, however alike another is.
    nearest = torch.where(centre, number, nearest)
    member = (centre[:, :, None] & pool[:, None, :] & (nearest[:, None, :] == number[:, None])).float()
    own = torch.eye(tokens.shape[1], device=tokens.device)
    made = torch.where(centre[:, :, None], member / member.sum(dim=-1, keepdim=True).clamp(min=1), own)
    return (plain | centre).float(), made


def density_peaks(distance: Tensor, among: Tensor) -> Tensor:
    """Return how much each token is a centre (B, N): its density times the distance to the nearest token that is denser.

    The densest has the largest distance there is instead. `distance`: (B, N, N), squared; `among`: (B, N) booleans, the tokens that
    count.
    """
    pairs = among[:, :, None] & among[:, None, :]
    density = (-_mean_of_nearest(distance, pairs)).exp()  # (B, N)
    denser = density[:, None, :] > density[:, :, None]
    denser = denser | (density[:, None, :] == density[:, :, None]) & earlier(density.shape[1], density.device)
    farthest = distance.masked_fill(~pairs, 0.0).amax(dim=(1, 2), keepdim=True)
    apart = torch.where(pairs & denser, distance, farthest).amin(dim=-1)
    return density * apart.sqrt()


def _mean_of_nearest(distance: Tensor, pairs: Tensor) -> Tensor:
    """Return (B, N), the mean of the least squared distances, the token's own of 0 among them; of as many as there are."""
    left = distance.masked_fill(~pairs, NEVER)
    number = torch.arange(distance.shape[-1], device=distance.device)
    total, count = torch.zeros_like(left[..., 0]), torch.zeros_like(left[..., 0])
    for _ in range(NEIGHBOURS):
        least = left.amin(dim=-1)
        there = least < NEVER
        total, count = total + torch.where(there, least, 0.0), count + there
        left = torch.where(number == left.argmin(dim=-1, keepdim=True), NEVER, left)
    return total / count.clamp(min=1)


def _squared_distances(tokens: Tensor) -> Tensor:
    """Return (B, N, N), divided by C, so that a density does not depend on the width."""
    length = tokens.square().sum(dim=-1)
    product = tokens @ tokens.mT
    return (length[:, :, None] + length[:, None, :] - 2 * product).clamp(min=0) / tokens.shape[-1]
