"""One block that passes on fewer tokens: attention, then the merge or the drop, then the MLP; a function of tensors alone.

So gradient checkpointing can run it again. A block with a cross token (see `cross_tokens`) asks that what matters.

Shapes: B batch, N tokens before, M tokens after, C channels, D key width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops.complete_matching import energy_matching, guided_matching
from mmcompress.ops.fusing import fused, neighbours
from mmcompress.ops.matching import bipartite_soft_matching
from mmcompress.ops.merging import PADDING_BIAS, log_size_bias, merge, unmerge
from mmcompress.ops.selection import restoring
from mmcompress.surgery.cross_tokens import cross_token
from mmcompress.surgery.reduction import ATTRIBUTE, MARGIN, Flow, Reduction


def reduce_tokens(
    block: nn.Module, own: Reduction, tokens: Tensor, flow: Flow, padded: bool, keep: bool, kwargs: dict[str, Any]
) -> tuple[Tensor, Flow]:
    """Return the block's output (B, M, C) and what it tells the next block. Depends on tensors and constants only."""
    count, guide = tokens.shape[1], cross_token(block, tokens, flow.sizes, own.protected)
    # Merges are a choice: through it no gradient reaches what guided them.
    guide = None if guide is None else guide.detach()
    branch, evidence = _attended(block, own, tokens, flow, padded, guide, kwargs)
    tokens = tokens + branch[:, :count]
    if own.merged:
        if evidence is None and own.method != "pool":
            raise RuntimeError(
                f"{type(block).__name__}.{own.attention} gave no keys; its config was replaced after merging"
            )
        tokens, flow = _merged(own, tokens, evidence, flow, padded, keep)
    elif own.kept:
        tokens, flow = _dropped(own, tokens, flow)
    branch = tokens
    for name in own.feed:
        branch = getattr(block, name)(branch)
    return tokens + branch, flow


def _attended(
    block: nn.Module,
    own: Reduction,
    tokens: Tensor,
    flow: Flow,
    padded: bool,
    guide: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Return what the attention adds to the tokens (B, N, C), and what it tells of them.

    Both hold a last row for a `guide` (B, 1, C), which looks at the tokens while none looks at it.
    """
    bias = None
    if flow.sizes is not None and (own.proportional or padded):
        bias = log_size_bias(flow.sizes, tokens.dtype, padded=padded, proportional=own.proportional)  # (B, N)
    if guide is not None:
        bias = tokens.new_zeros(tokens.shape[:2]) if bias is None else bias
        bias = torch.cat([bias, bias.new_full((bias.shape[0], 1), PADDING_BIAS)], dim=1)
        tokens = torch.cat([tokens, guide], dim=1)
    mask = None if bias is None else bias[:, None, None, :]  # (B, 1, 1, N)
    branch, evidence = tokens, None
    for name in own.attend:
        child = getattr(block, name)
        if name == own.attention:
            branch, evidence = child(branch, attention_mask=mask, **kwargs)
        else:
            branch = child(branch)
    return branch, evidence


def told_by_guide(block: nn.Module, tokens: Tensor, flow: Flow, padded: bool, kwargs: dict[str, Any]) -> Tensor:
    """Return what a block makes of its cross token (B, 1, C) that looks at `tokens` (B, N, C), with gradient to it alone."""
    own: Reduction = getattr(block, ATTRIBUTE)
    tokens = tokens.detach()
    guide = cross_token(block, tokens, flow.sizes, own.protected)
    assert guide is not None, "add_cross_token gave it one"
    branch, _ = _attended(block, own, tokens, flow, padded, guide, kwargs)
    state = guide + branch[:, -1:]
    branch = state
    for name in own.feed:
        branch = getattr(block, name)(branch)
    return state + branch


def _merged(
    own: Reduction, tokens: Tensor, evidence: Tensor | None, flow: Flow, padded: bool, keep: bool
) -> tuple[Tensor, Flow]:
    assignment, weights = _assigned(own, tokens, evidence, flow.sizes if padded else None)
    if own.method == "evit" and weights is not None and flow.sizes is not None:
        # How much is looked at a token says how much it counts, however many it stands for.
        weights = weights / flow.sizes.clamp(min=1)
    tokens, sizes = merge(tokens, assignment, flow.sizes, weights)
    return tokens, Flow(sizes, (*flow.assignments, assignment) if keep else ())


def _assigned(
    own: Reduction, tokens: Tensor, evidence: Tensor | None, sizes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return which tokens go into which, (B, M, N), and how much each counts, (B, N) or None.

    `evidence`: what the attention says of its tokens, keys (B, N, D) or scores (B, N); with a cross token's key behind them.
    `sizes`: where some are padding.
    """
    if own.method == "pool":
        rows = neighbours(tokens.shape[1], own.merged, own.protected).to(tokens.device)
        return rows.expand(tokens.shape[0], -1, -1), None
    assert evidence is not None, "bind_block has the attention tell"
    count = tokens.shape[1]
    match own.method:
        case "tome":
            return bipartite_soft_matching(evidence, own.merged, own.protected, sizes), None
        case "pitome":
            margin = MARGIN * (1 - own.depth)
            return energy_matching(evidence, own.merged, own.protected, margin, sizes), None
        case "crossget":
            guide = evidence[:, count:] if evidence.shape[1] > count else None
            return guided_matching(evidence[:, :count], own.merged, own.protected, sizes, guide)
    return fused(evidence, own.merged, own.protected)


def _dropped(own: Reduction, tokens: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
    if tokens.shape[1] != own.tokens:
        raise UsageError(
            f"random selection was made for {own.tokens} tokens, but here are {tokens.shape[1]}",
            hint="give images of the model's own size, or use method tome",
        )
    kept = torch.tensor(own.kept, device=tokens.device)
    sizes = None if flow.sizes is None else flow.sizes.index_select(1, kept)
    return tokens.index_select(1, kept), Flow(sizes)


def restored(own: Reduction, tokens: Tensor, flow: Flow) -> Tensor:
    if own.survivors:
        survivors = torch.tensor(own.survivors, device=tokens.device)
        weights = tokens.new_ones(tokens.shape[:2]) if flow.sizes is None else flow.sizes.to(tokens.dtype)
        return restoring(survivors, own.original, own.protected, weights) @ tokens
    for assignment in reversed(flow.assignments):
        tokens = unmerge(tokens, assignment)
    return tokens
