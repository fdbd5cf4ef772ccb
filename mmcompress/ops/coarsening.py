"""Runs of neighbouring tokens of which some stand as one: those that are looked at least.

Vcc, arXiv 2305.04241, sections 3.2 and 4: what VIP tokens look at stays fine, of other runs a block sees the mean, counted as often
as it has members; what the block adds to a mean it adds to each of them. So nothing is lost between blocks: a run that was coarse
in one can be fine in the next, exactly as it would stand had it been fine only there. Deliberate differences: how much a run is
looked at is known from the attention before, where the paper computes it anew with the coming block's own queries and keys; the
number that is left is a share of each sample's own tokens, where the paper gives a number of fine runs; one run may be coarse in
part, so that the share is met.

Padding may lie on either side. Only comparisons, sums and one gather: exporters need no scatter and no loop over data.

Shapes: B batch, N tokens, M rows, S runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmcompress.ops.ranks import rank

PARTS = 1000
"""Shares are counted in these, so that every runtime rounds alike."""


def tokens_left(tokens: Tensor | int, keep: int, run: int, protected: int) -> Any:
    """Return how many of `tokens` are left of which `keep` parts of 1000 are wanted: fewer than one for each run are not possible.

    One more token never leaves fewer: rows for the longest of a batch are enough for all.
    """
    wanted = tokens - tokens * (PARTS - keep) // PARTS
    runs = (tokens - protected + run - 1) // run
    least = protected + runs
    if isinstance(tokens, Tensor):
        return torch.maximum(torch.as_tensor(wanted), torch.as_tensor(least))
    return torch.sym_max(wanted, least)  # while tracing, sizes are no plain integers


def coarse(looked_at: Tensor, present: Tensor, keep: int, run: int, protected: int = 0) -> Tensor:
    """Return the assignment (B, M, N) of 0s and 1s: which tokens stand as one. Rows left over have none, nor has padding one.

    `looked_at`: (B, N), not negative. `present`: (B, N) booleans, where a token is and not padding. `keep`: parts of 1000 of each
    sample's tokens. Runs have `run` tokens, the last one what is left; the first `protected` tokens are in none.
    """
    count = present.shape[1]
    number = present.long().cumsum(dim=-1) - 1
    place = (number - protected).clamp(min=0)
    inside = present & (number >= protected)
    runs = torch.arange((count - protected + run - 1) // run, device=present.device)
    members = inside[:, None, :] & ((place // run)[:, None, :] == runs[:, None])  # (B, S, N)
    size = members.sum(dim=-1)
    mean = (members * looked_at.detach().float()[:, None, :]).sum(dim=-1) / size.clamp(min=1)
    can_leave = (size - 1).clamp(min=0)
    # From the run that is looked at least on, each gives up what it can until enough have left.
    order = rank(-mean)
    before = ((order[:, None, :] < order[:, :, None]) * can_leave[:, None, :]).sum(dim=-1)
    tokens = present.sum(dim=-1)
    removed = tokens - tokens_left(tokens, keep, run, protected)
    leaves = torch.minimum((removed[:, None] - before).clamp(min=0), can_leave)  # (B, S)
    within = place % run
    joins = inside & (within > 0) & (within <= (members * leaves[:, :, None]).sum(dim=1))
    row = (present & ~joins).long().cumsum(dim=-1) - 1
    rows = torch.arange(tokens_left(count, keep, run, protected), device=present.device)
    return (present[:, None, :] & (row[:, None, :] == rows[:, None])).float()


def added_back(tokens: Tensor, assignment: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return tokens (B, N, C), each with what was added to the row it went into.

    `assignment`: (B, M, N); `before`, `after`: (B, M, C).
    """
    return tokens + assignment.mT.to(tokens.dtype) @ (after - before)
