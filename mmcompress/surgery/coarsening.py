"""Blocks that compute with some runs of their tokens as one, and give out all of them; see `ops.coarsening`.

`bind` gives some blocks of an encoder instance a `forward` of their own, which calls what their class computes with fewer rows,
and so to the attentions that say what was looked at. Before or after the residual, blocks may normalise as they like. Classes
stay as they were, no module is added, and no name in the state dict changes.

Masks must be the same for all queries, and blocks must take (tokens, mask, ...) and return a tensor.

Shapes: B batch, N tokens, M rows, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops.coarsening import added_back, coarse
from mmcompress.ops.dropping import scattered
from mmcompress.ops.masks import visible
from mmcompress.ops.merging import log_size_bias, merge
from mmcompress.surgery.attention import give_scores
from mmcompress.surgery.ledger import Ledger

ATTRIBUTE = "coarsening"


class LookedAt(Ledger):
    """Where a tower's blocks leave how much each token (B, N) was looked at."""

    rows: Tensor | None = None
    """As an attention says it, (B, M)."""
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Coarsening:
    """What one block does with runs of its tokens."""

    keep: int
    """Parts of 1000 of its tokens that it computes with."""
    run: int
    protected: int
    drawn: tuple[int, ...] = ()
    """Factors by which runs are drawn at random instead."""
    ledger: LookedAt = field(default_factory=LookedAt)


def bind(blocks: Sequence[nn.Module], attentions: Sequence[str], first: int, how: Coarsening) -> None:
    """Make `blocks` from `first` (>= 1) on coarsen their tokens, which are looked at in the blocks before.

    `attentions`: the name in each block of the child that attends. Raises UsageError where one does not tell what it looks at.
    """
    for index, (block, name) in enumerate(zip(blocks, attentions, strict=True)):
        tells = first - 1 <= index < len(blocks) - 1 and not how.drawn
        if tells:
            attention = _choosing(block.get_submodule(name))
            give_scores(attention, class_token=how.protected > 0)
            setattr(attention, ATTRIBUTE, how)
            attention.forward = MethodType(_attend, attention)
        if tells or index >= first:
            setattr(block, ATTRIBUTE, how if index >= first else replace(how, keep=0))
            block.forward = MethodType(_forward, block)


def coarsening_of(block: nn.Module) -> Coarsening | None:
    """Return how a block coarsens its tokens, None where it does not."""
    own: Coarsening | None = getattr(block, ATTRIBUTE, None)
    return own if own is not None and own.keep else None


def openers(model: nn.Module, blocks: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of those blocks that say what is looked at before any coarsens, and so have to stay."""
    owns = [getattr(model.get_submodule(path), ATTRIBUTE, None) for path in blocks]
    return tuple(index for index, own in enumerate(owns) if own is not None and not own.keep)


def _choosing(attention: nn.Module) -> nn.Module:
    """Return the module, it or one inside it, that chooses its attention function by its config."""
    found = (
        module for module in attention.modules() if hasattr(getattr(module, "config", None), "_attn_implementation")
    )
    return next(found, attention)


def _attend(self: Any, *args: Any, **kwargs: Any) -> Any:
    made = type(self).forward(self, *args, **kwargs)
    own: Coarsening = getattr(self, ATTRIBUTE)
    own.ledger.rows = made[1].detach()
    return made


def _forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    own: Coarsening = getattr(self, ATTRIBUTE)
    if self.training and getattr(self, "gradient_checkpointing", False):
        raise UsageError(
            "a model that coarsens tokens cannot be trained with gradient checkpointing",
            hint="call model.activation_checkpointing_disable(), or train before coarsening",
        )
    ledger = own.ledger
    if not own.keep:
        made: Tensor = type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)
        ledger.tokens, ledger.rows = ledger.rows, None
        return made
    present = _present(attention_mask, hidden_states)
    looked_at = scattered(present, own.drawn) if own.drawn else ledger.tokens
    if looked_at is None:
        raise RuntimeError("the attention before this block gave no scores; its config was replaced after coarsening")
    assignment = coarse(looked_at, present, own.keep, own.run, own.protected)
    rows, sizes = merge(hidden_states, assignment)
    mask = log_size_bias(sizes, hidden_states.dtype, padded=True)[:, None, None, :]
    made = type(self).forward(self, rows, mask, *args, **kwargs)
    told, ledger.rows = ledger.rows, None
    if told is not None:
        # What looks at a mean looks at each of its members as much.
        ledger.tokens = ((told / sizes.clamp(min=1))[:, None] @ assignment)[:, 0]
    return added_back(hidden_states, assignment, rows, made)


def _present(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return (B, N) booleans: no padding. Raises UsageError for masks of other forms (flash attention's)."""
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.dim() != 4:
        raise UsageError(
            f"coarsening tokens got a mask of {mask.dim()} dimensions; expected 4",
            hint='set the attention implementation to "sdpa" or "eager"',
        )
    return visible(mask)[:, 0, 0].expand(tokens.shape[0], -1)
