"""What is known of a prompt's tokens while it goes through a language model, and which image tokens leave: see `dropping`.

Shapes: B batch, T tokens, P past tokens, C channels, M tokens left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.dropping import (
    evenly_spread,
    last_of,
    raters,
    recovered,
    room_for,
    scattered,
    slots_of,
    unlike_earlier,
)
from mmcompress.ops.masks import visible
from mmcompress.ops.recycling import recycled
from mmcompress.surgery.cache_lengths import CACHE, held_by, remember
from mmcompress.surgery.noting import Noted

Method = Literal["fastv", "pyramiddrop", "sparsevlm", "recoverable", "lftr", "grid", "random"]
SCORED: tuple[Method, ...] = ("fastv", "pyramiddrop", "sparsevlm")
"""Methods that ask an attention."""


@dataclass(frozen=True)
class Drop:
    """One place where image tokens leave."""

    after: int
    """How many blocks they have been through."""
    keep: float
    """Share that stays, of those that came so far."""
    most: int = 0
    """With a number, at most so many stay instead."""


class Flow(NamedTuple):
    """What goes from block to block beside the tokens."""

    present: Tensor
    """(B, T) booleans: no padding."""
    image: Tensor
    """(B, T) booleans: a picture's."""
    asking: Tensor
    """(B, T): the shares of the tokens whose attention counts."""
    given: dict[str, Any] = {}
    """What blocks are called with in place of what the model gives all of them; empty before the first place."""
    scores: Tensor | None = None
    """(B, P + T), of the attention before the next place."""
    left: tuple[tuple[Tensor, Tensor], ...] = ()
    """At each place so far: which token stood in which slot (B, M, T) and the tokens there were (B, T, C)."""
    answer: Tensor | None = None
    """(B, T) booleans: behind the end of the question, where one follows in the same row; see `asked_at`."""
    stays: Chosen | None = None
    """Where tokens leave caches alone: which ones are left."""

    @property
    def words(self) -> Tensor:
        """(B, T) booleans: the prompt's text."""
        found = self.present & ~self.image
        return found if self.answer is None else found & ~self.answer


class PromptLedger(Noted):
    """Where the model and its blocks leave what later ones need."""

    asked: Tensor | None = None
    """(B,), see `asked_at`."""
    rooms: tuple[Tensor, ...] | None = None
    """See `given_rooms`."""
    flow: Flow | None = None

    def forget(self) -> None:
        """Forget what is known of a prompt that has been read."""
        self.image = self.flow = None


@dataclass(frozen=True)
class Dropping:
    """What one block has to do."""

    method: Method
    drops: tuple[Drop, ...]
    attention: str
    """Name in each block of the child that attends."""
    mlp: str = ""
    """Name in each block of the child that those which leave the caches skip while the prompt is read; empty: they skip none."""
    drawn: tuple[int, ...] = ()
    """Factors that "random" draws by."""
    recycles: bool = False
    """Whether the best of what leaves comes back as a few means; see `ops.recycling`."""
    both_ways: bool = False
    """Whether the prompt's tokens look at one another in both directions."""
    place: int = -1
    """The latest place at or before this block; -1: it stands before the first."""
    starts: bool = False
    """Whether tokens leave right before it."""
    first: bool = False
    """Whether it is the first that has something to do."""
    last: bool = False
    in_cache: bool = False
    """Whether tokens leave the caches alone, of this block and those behind it, once the prompt has been read."""
    ledger: PromptLedger = field(default_factory=PromptLedger)


class Chosen(NamedTuple):
    """What is left at one place."""

    rows: Tensor
    """(B, M, T): which token stands in which slot."""
    shares: Tensor
    """(B, M, T): of which tokens it is made; the same but for means of several."""
    room: Tensor
    """(B, M), 1 where a token does."""
    filled: Tensor
    """(B, P + M): the same of those that blocks behind the place hold already, too."""
    past: int
    """P."""


def opened(block: Any, own: Dropping, tokens: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Flow:
    """Return what is known of the tokens (B, T, C) before any left."""
    batch, count = tokens.shape[:2]
    if mask is not None and mask.dim() != 4:
        raise UsageError(
            f"dropping image tokens got a mask of {mask.dim()} dimensions; expected 4",
            hint='set the attention implementation to "sdpa" or "eager"',
        )
    present = torch.ones(batch, count, dtype=torch.bool, device=tokens.device)
    if mask is not None:
        # The last row looks at all that is there, whichever side the padding is on.
        present = visible(mask)[:, 0, -1, -count:].expand(batch, -1)
    image = own.ledger.image
    image = torch.zeros_like(present) if image is None else image & present
    asking, answer = last_of(present), None
    if own.ledger.asked is not None:
        past = held_by(kwargs.get(CACHE), block.get_submodule(own.attention).layer_idx)
        places = torch.arange(count, device=tokens.device) + past
        asking = (places == own.ledger.asked[:, None]).float()
        answer = places > own.ledger.asked[:, None]
    flow = Flow(present, image, asking, answer=answer)
    return flow._replace(asking=raters(tokens.detach(), image, flow.words)) if own.method == "sparsevlm" else flow


def chosen(block: Any, own: Dropping, flow: Flow, tokens: Tensor, cache: Any) -> Chosen:
    """Return which of `tokens` (B, T, C) are left where `block` is the first without others. Raises what `cache_lengths` raises."""
    drop, past = own.drops[own.place], held_by(cache, block.get_submodule(own.attention).layer_idx)
    if own.ledger.rooms is not None:
        filled = own.ledger.rooms[own.place]
        room = filled[:, past:]
    else:
        room = room_for(flow.present, flow.image, drop.keep, drop.most)
        filled = remember(cache, own.place, past, room)
    scores = _scores(own, flow, tokens, room)
    if own.recycles:
        scores, made = recycled(tokens.detach(), flow.image, scores, _images_kept(flow, room))
        rows = slots_of(flow.present, flow.image, scores, room)
        shares = rows @ made
    else:
        rows = shares = slots_of(flow.present, flow.image, scores, room)
    if own.ledger.watched is not None:
        own.ledger.watched.append(shares)
    return Chosen(rows, shares, room, filled, past)


def _scores(own: Dropping, flow: Flow, tokens: Tensor, room: Tensor) -> Tensor:
    """Return how much each token (B, T) should stay."""
    if own.method == "random":
        # Each time others: the numbers that are left are small ones again.
        return scattered(flow.image, (*own.drawn[own.place :], *own.drawn[: own.place]))
    if own.method == "grid":
        return evenly_spread(flow.image, _images_kept(flow, room))
    if own.method == "recoverable":
        return recovered(tokens.detach(), flow.image, flow.words, _images_kept(flow, room))
    if own.method == "lftr":
        return unlike_earlier(tokens.detach(), flow.image)
    if flow.scores is None:
        raise RuntimeError("the attention before this block gave no scores; its config was replaced after dropping")
    return flow.scores[:, -flow.image.shape[1] :]


def _images_kept(flow: Flow, room: Tensor) -> Tensor:
    """Return how many image tokens (B,) the slots `room` (B, M) have place for."""
    return room.sum(dim=-1) - (flow.present & ~flow.image).sum(dim=-1)
