"""What a block that passes on fewer tokens knows of it: its settings, and what goes from block to block beside the tokens.

See `merging`, which binds blocks, and `merging_step`, which computes one.

Shapes: B batch, N tokens before, M tokens after, R merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor, nn

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
