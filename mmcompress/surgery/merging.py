"""Blocks that pass on fewer tokens than they were given.

`bind_block` gives one block instance a `forward` of its own: attention, then fewer tokens, then the MLP. The class stays what it
was, no module is added, and no name in the state dict changes; what the block has to know lies in its attribute `reduction`. Only
a learned guide is a parameter of the block, see `cross_tokens`.

Token sizes go from block to block in a `TokenLedger` that the tower's blocks share. The first block of a forward opens it and the
last one, or the pooling attention behind it, closes it. Each block's arithmetic is a function of tensors alone
(`merging_step.reduce_tokens`), so gradient checkpointing can run it again without the ledger.

Incoming padding masks become sizes of 0; from then on the sizes make every mask. Masks must be the same for all queries
(bidirectional attention), and attention must be additive in logits (scaled dot product or eager).

Shapes: B batch, N tokens before, M tokens after, C channels, D key width, H heads.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops.merging import log_size_bias
from mmcompress.ops.schedule import annealed
from mmcompress.ops.token_choice import standing_at
from mmcompress.surgery.attention import give_keys, give_scores
from mmcompress.surgery.merging_step import reduce_tokens, restored
from mmcompress.surgery.reduction import ATTRIBUTE, Flow, Reduction, TokenLedger


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
        made, after = reduce_tokens(self, own, tokens, Flow(sizes, assignments), padded, keep, kwargs)
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
            hidden_states = restored(own, hidden_states, ledger.flow)
        if not own.pooled:
            ledger.flow = None
    return hidden_states


def _went(own: Reduction, flow: Flow) -> Tensor | None:
    """Return what `ledger.watching` gathers."""
    if own.kept:
        return standing_at(torch.tensor(own.kept), own.tokens)
    return flow.assignments[-1] if own.merged else None


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
