"""Which tokens to drop when nobody looks at them: the random control.

A method that reduces tokens is worth its cost only if it beats dropping the same number at random. The choice is made once, for all
images alike; it is a list of positions, so that it can be recorded and replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.schedule import largest_merge


def random_selection(tokens: int, dropped: int, protected: int, generator: torch.Generator) -> Tensor:
    """Return the kept positions (N - R,), ascending, the protected leading ones among them.

    Drops no more than merging could (`largest_merge`), so that both can follow one schedule. Raises UsageError beyond that.
    """
    limit = largest_merge(tokens, protected)
    if not 0 <= dropped <= limit:
        raise UsageError(
            f"cannot drop {dropped} of {tokens} tokens with {protected} protected; the limit is {limit}",
            hint="drop fewer tokens",
        )
    shuffled = protected + torch.randperm(tokens - protected, generator=generator)
    kept = shuffled[dropped:].sort().values
    return torch.cat([torch.arange(protected), kept])


def restoring(kept: Tensor, tokens: int, protected: int, weights: Tensor) -> Tensor:
    """Return (B, N, M) that puts M kept tokens back in their N positions, and their mean in the dropped ones.

    So a mean over all unprotected positions is the mean over the kept ones. `kept`: (M,) positions among N; `weights`: (B, M),
    0 for padding, which stays out of the mean.
    """
    place = torch.arange(tokens, device=kept.device)[:, None] == kept[None, :]  # (N, M)
    missing = ~place.any(dim=1, keepdim=True)
    share = weights * (kept >= protected)
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1)
    return place.to(weights.dtype) + missing.to(weights.dtype) * share[:, None, :]
