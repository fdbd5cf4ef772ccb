"""Blocks that pass on fewer tokens than they were given.

`bind_block` gives one block instance a `forward` of its own: attention, then fewer tokens, then the MLP. The class stays what it
was, no module is added, and no name in the state dict changes; what the block has to know lies in its attribute `reduction`.

Token sizes go from block to block in a `TokenLedger` that the tower's blocks share. The first block of a forward opens it and the
last one, or the pooling attention behind it, closes it. Each block's arithmetic is a function of tensors alone (`_reduce`), so
gradient checkpointing can run it again without the ledger.

Incoming padding masks become sizes of 0; from then on the sizes make every mask. Masks must be the same for all queries
(bidirectional attention), and attention must be additive in logits (scaled dot product or eager).

Shapes: B batch, N tokens before, M tokens after, C channels, D key width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops.complete_matching import energy_matching, guided_matching
from mmcompress.ops.fusing import fused, neighbours
from mmcompress.ops.matching import bipartite_soft_matching
from mmcompress.ops.merging import PADDING_BIAS, log_size_bias, merge, unmerge
from mmcompress.ops.schedule import annealed
from mmcompress.ops.selection import restoring
from mmcompress.ops.token_choice import standing_at
from mmcompress.surgery.attention import give_keys, give_scores
from mmcompress.surgery.cross_tokens import cross_token
from mmcompress.surgery.ledger import Ledger

Method = Literal["tome", "pitome", "crossget", "evit", "pool"]
ATTRIBUTE = "reduction"
MARGIN = 0.9
"""From which cosine PiToMe counts tokens as alike in the first block; it falls to 0 behind the last."""


class Flow(NamedTuple):
    """What goes from block to block beside the tokens."""

    sizes: Tensor | None = None
    """(B, N), at least float32 so that they stay whole numbers; None while every token has size 1."""
    assignments: tuple[Tensor, ...] = ()
    """The merges so far, each (B, M, N); kept only when the tokens are to be put back."""


class TokenLedger(Ledger):
    """Where a tower's blocks leave the `Flow` for the next one."""

    flow: Flow | None = None
    padded = False


@dataclass(frozen=True)
class Reduction:
    """What one block does with its tokens, and its part in the tower."""

    attend: tuple[str, ...]
    """Children to call in order for the first residual branch; `attention` is one of them."""
    attention: str
    feed: tuple[str, ...]
    merged: int = 0
    """R, merged by `method`."""
    method: Method = "tome"
    depth: float = 0.0
    """Share of the tower's blocks that stand before this one."""
    kept: tuple[int, ...] = ()
    """Positions kept; the others are dropped. Empty: none are."""
    tokens: int = 0
    """N that `kept` was made for."""
    protected: int = 0
    proportional: bool = True
    first: bool = False
    last: bool = False
    pooled: bool = False
    """The ledger stays open after the last block, for a pooling attention."""
    restore: bool = False
    """The last block puts the original number of tokens back."""
    survivors: tuple[int, ...] = ()
    """For `restore` after dropping: the original positions that are left at the end."""
    original: int = 0
    """N at the start of the tower, for `survivors`."""
    ledger: TokenLedger = field(default_factory=TokenLedger)


def bind_block(block: nn.Module, reduction: Reduction) -> None:
    """Make `block` reduce its tokens; the block must be pre-norm, return a tensor, and take (tokens, mask, ...).

    Raises UsageError where the method asks an attention that gives neither keys nor weights.
    """
    if reduction.merged and reduction.method != "pool":
        attention = block.get_submodule(reduction.attention)
        if reduction.method == "evit":
            give_scores(attention, class_token=reduction.protected > 0)
        else:
            give_keys([attention])
    setattr(block, ATTRIBUTE, reduction)
    block.forward = MethodType(_forward, block)


def bind_pool(pool: nn.MultiheadAttention, ledger: TokenLedger, *, proportional: bool) -> None:
    """Make the attention pooling `pool` weigh its keys by token size.

    A mask that its caller makes from the original padding no longer fits and is ignored: padding has size 0.
    """
    setattr(pool, ATTRIBUTE, (ledger, proportional))
    pool.forward = MethodType(_pool_forward, pool)  # type: ignore[method-assign]


def is_reduced(module: nn.Module) -> bool:
    """Whether a block was bound by `bind_block`."""
    return hasattr(module, ATTRIBUTE)


def drops(block: nn.Module) -> bool:
    """Whether a block drops tokens at fixed places."""
    own: Reduction | None = getattr(block, ATTRIBUTE, None)
    return own is not None and bool(own.kept)


def tokens_left(block: nn.Module, otherwise: int) -> int:
    """Return how many tokens a block passes on at the model's own input size, `otherwise` where it is not bound."""
    own: Reduction | None = getattr(block, ATTRIBUTE, None)
    if own is None:
        return otherwise
    return len(own.kept) if own.kept else own.tokens - own.merged


def ledger_of(block: nn.Module) -> TokenLedger | None:
    """Return what the blocks of a reduced tower share, by any of them; None where it is not bound."""
    own: Reduction | None = getattr(block, ATTRIBUTE, None)
    return None if own is None else own.ledger


def _forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    own: Reduction = self.reduction
    ledger = own.ledger
    if ledger.progress < 1:
        own = replace(own, merged=annealed(own.merged, ledger.progress))
    if own.first or ledger.flow is None:
        ledger.flow = Flow(sizes=_sizes(attention_mask, hidden_states))
        ledger.padded = ledger.flow.sizes is not None
    flow, padded = ledger.flow, ledger.padded

    restore = own.restore or ledger.put_back
    keep = restore or ledger.watched is not None

    def step(tokens: Tensor, sizes: Tensor | None, *assignments: Tensor) -> tuple[Tensor | None, ...]:
        made, after = _reduce(self, own, tokens, Flow(sizes, assignments), padded, keep, kwargs)
        return made, after.sizes, *after.assignments

    if self.training and getattr(self, "gradient_checkpointing", False):
        made = self._gradient_checkpointing_func(step, hidden_states, flow.sizes, *flow.assignments)
    else:
        made = step(hidden_states, flow.sizes, *flow.assignments)
    hidden_states, sizes, *assignments = made
    ledger.flow = Flow(sizes, tuple(assignments))
    if ledger.watched is not None:
        ledger.watched.append(_went(own, ledger.flow))
    if own.last:
        if restore:
            hidden_states = _restored(own, hidden_states, ledger.flow)
        if not own.pooled:
            ledger.flow = None
    return hidden_states


def _reduce(
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


def _went(own: Reduction, flow: Flow) -> Tensor | None:
    """Return what `ledger.watching` gathers."""
    if own.kept:
        return standing_at(torch.tensor(own.kept), own.tokens)
    return flow.assignments[-1] if own.merged else None


def _restored(own: Reduction, tokens: Tensor, flow: Flow) -> Tensor:
    if own.survivors:
        survivors = torch.tensor(own.survivors, device=tokens.device)
        weights = tokens.new_ones(tokens.shape[:2]) if flow.sizes is None else flow.sizes.to(tokens.dtype)
        return restoring(survivors, own.original, own.protected, weights) @ tokens
    for assignment in reversed(flow.assignments):
        tokens = unmerge(tokens, assignment)
    return tokens


def _sizes(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return sizes (B, N) of 1 and, where the mask hides a token, 0; None without padding.

    `mask`: (B, 1, N or 1, N), true or 0 where attention is allowed. Raises UsageError for other forms (flash attention's).
    """
    # While exporting, transformers (5.x) makes a mask even without padding, by expanding one column: all keys are alike.
    if mask is None or mask.stride(-1) == 0:
        return None
    if mask.dim() != 4:
        raise UsageError(
            f"token reduction got a mask of {mask.dim()} dimensions; expected 4",
            hint='set the attention implementation to "sdpa" or "eager"',
        )
    seen = mask[:, 0, 0, :]
    allowed = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    return allowed.to(torch.promote_types(tokens.dtype, torch.float32)).expand(tokens.shape[0], -1)


def _pool_forward(self: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    ledger, proportional = self.reduction
    flow, ledger.flow = ledger.flow, None
    if flow is not None:
        kwargs["attn_mask"] = None
        if flow.sizes is not None and (proportional or ledger.padded):
            bias = log_size_bias(flow.sizes, query.dtype, padded=ledger.padded, proportional=proportional)
            # (B, M) -> (B * H, 1, M), every head of an image the same
            kwargs["attn_mask"] = bias.repeat_interleave(self.num_heads, dim=0)[:, None, :]
    return type(self).forward(self, query, key, value, **kwargs)
