"""A language model whose prompts lose image tokens on their way through its blocks.

`bind` gives some blocks of the instance a `forward` of their own, and so to an attention in front of each place where tokens leave:
it says how much each token is looked at. The model around them notes which tokens are a picture's. Blocks behind such a place are
called with the tokens that are left, the positions those had from the start, and a mask of their own; their caches of keys and
values hold no others. Behind the last block every token stands in its place again, those that left as they were then, so
that whoever reads the output at some place finds what belongs there.

What the blocks of one call tell each other lies in a `PromptLedger`; what an answer's next call must know, beside the cache (see
`cache_lengths`).

Shapes: B batch, T tokens, P past tokens, C channels, M tokens left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops.dropping import counts_kept, evenly_spread, last_of, raters, room_for, scattered, slots_of
from mmcompress.ops.masks import as_added, causal_mask, visible
from mmcompress.surgery.attention import give_asked
from mmcompress.surgery.cache_lengths import held_by, remember
from mmcompress.surgery.ledger import Ledger

Method = Literal["fastv", "pyramiddrop", "sparsevlm", "grid", "random"]
SCORED: tuple[Method, ...] = ("fastv", "pyramiddrop", "sparsevlm")
"""Methods that ask an attention."""
ATTRIBUTE = "dropping"


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
    given: dict[str, Any]
    """What blocks are called with in place of what the model gives all of them; empty before the first place."""
    scores: Tensor | None = None
    """(B, P + T), of the attention before the next place."""
    left: tuple[tuple[Tensor, Tensor], ...] = ()
    """At each place so far: which token stood in which slot (B, M, T) and the tokens there were (B, T, C)."""


class PromptLedger(Ledger):
    """Where the model and its blocks leave what later ones need."""

    image: Tensor | None = None
    """(B, T) booleans; None where the model was given rows in place of token ids: then none is a picture's."""
    asked: Tensor | None = None
    """(B,), see `asked_at`."""
    rooms: tuple[Tensor, ...] | None = None
    """See `given_rooms`."""
    flow: Flow | None = None


@dataclass(frozen=True)
class Dropping:
    """What one block has to do."""

    method: Method
    drops: tuple[Drop, ...]
    attention: str
    """Name in each block of the child that attends."""
    drawn: tuple[int, ...] = ()
    """Factors that "random" draws by."""
    both_ways: bool = False
    """Whether the prompt's tokens look at one another in both directions."""
    place: int = -1
    """The latest place at or before this block; -1: it stands before the first."""
    starts: bool = False
    """Whether tokens leave right before it."""
    first: bool = False
    """Whether it is the first that has something to do."""
    last: bool = False
    ledger: PromptLedger = field(default_factory=PromptLedger)


def bind(model: nn.Module, blocks: Sequence[nn.Module], images: Sequence[int], own: Dropping) -> None:
    """Make a language model's blocks drop image tokens.

    `model` is called with input_ids, of which `images` are a picture's, and calls the `blocks` in turn. `own` says where and how.
    Raises UsageError where a method asks an attention that does not tell.
    """
    places = [drop.after for drop in own.drops]
    scoring = {after - 1 for after in places} if own.method in SCORED else set()
    # What words have to do with a picture is asked of them as they come in.
    opening = 0 if own.method == "sparsevlm" else min(scoring | set(places))
    for index in range(opening, len(blocks)):
        place = sum(after <= index for after in places) - 1
        mine = replace(own, place=place, starts=index in places, first=index == opening, last=index == len(blocks) - 1)
        block = blocks[index]
        if index in scoring:
            attention = block.get_submodule(own.attention)
            give_asked(attention, one=own.method != "sparsevlm")
            setattr(attention, ATTRIBUTE, mine)
            attention.forward = MethodType(_attend, attention)
        setattr(block, ATTRIBUTE, mine)
        block.forward = MethodType(_forward, block)
    setattr(model, ATTRIBUTE, (own, tuple(images)))
    model.forward = MethodType(_note_images, model)


def dropping_of(model: nn.Module) -> Dropping | None:
    """Return how the prompts of a model lose tokens, None where they do not; `model` is the one `bind` was given."""
    found: tuple[Dropping, tuple[int, ...]] | None = getattr(model, ATTRIBUTE, None)
    return None if found is None else found[0]


def has_to_stay(block: nn.Module) -> bool:
    """Whether others rely on this block: it opens the ledger or closes it, tokens leave before it, or its attention is asked."""
    own: Dropping | None = getattr(block, ATTRIBUTE, None)
    asked = any(hasattr(module, ATTRIBUTE) for name, module in block.named_modules() if name)
    return own is not None and (own.first or own.starts or own.last or asked)


@contextlib.contextmanager
def asked_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """While it is open, the tokens at `places` (B,) of each row are those that end a question, and not the last ones.

    For rows in which an answer follows.
    """
    own = dropping_of(model)
    if own is None:
        yield
        return
    own.ledger.asked = places
    try:
        yield
    finally:
        own.ledger.asked = None


@contextlib.contextmanager
def given_rooms(own: Dropping | None, image: Tensor | None, rooms: Sequence[Tensor]) -> Iterator[None]:
    """While it is open, blocks that are called by themselves know which tokens are a picture's, and how many stay.

    `image`: (B, T). `rooms`: for each place the slots (B, P + M) of blocks behind it, 1 where there is a token. Nothing is then
    put back behind the last block: its output are the (B, M, C) that are left.
    """
    if own is None or image is None:
        yield
        return
    own.ledger.image, own.ledger.rooms = image.bool(), tuple(rooms)
    try:
        yield
    finally:
        own.ledger.image = own.ledger.rooms = own.ledger.flow = None


def rooms_for(own: Dropping, present: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    """Return for each place the slots (B, M) that a prompt fills behind it. `present`, `image`: (B, T)."""
    made = []
    for drop in own.drops:
        room = room_for(present, image, drop.keep, drop.most)
        # Which ones stay is seen later; how many are a picture's is known.
        images = counts_kept(image.sum(dim=-1), drop.keep, drop.most)
        behind = room.sum(dim=-1, keepdim=True) - room.cumsum(dim=-1)
        present, image = room, (room.bool() & (behind < images[:, None])).long()
        made.append(room)
    return tuple(made)


def _note_images(self: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    own, images = getattr(self, ATTRIBUTE)
    if input_ids is not None:
        own.ledger.image = torch.isin(input_ids, torch.tensor(images, device=input_ids.device))
    try:
        return type(self).forward(self, input_ids, *args, **kwargs)
    finally:
        own.ledger.image = own.ledger.flow = None


def _attend(self: Any, *args: Any, **kwargs: Any) -> Any:
    own: Dropping = getattr(self, ATTRIBUTE)
    flow = own.ledger.flow
    assert flow is not None, "the first block opens it"
    made = type(self).forward(self, *args, asking=flow.asking, **kwargs)
    own.ledger.flow = flow._replace(scores=made[1].detach())
    return made


def _forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    own: Dropping = getattr(self, ATTRIBUTE)
    if self.training and getattr(self, "gradient_checkpointing", False):
        raise UsageError(
            "a model that drops image tokens cannot be trained with gradient checkpointing",
            hint="call model.gradient_checkpointing_disable(), or train before dropping",
        )
    if own.first:
        own.ledger.flow = _opened(self, own, hidden_states, attention_mask, kwargs)
    assert own.ledger.flow is not None, "the first block opens it"
    if own.starts:
        mask = own.ledger.flow.given.get("attention_mask", attention_mask)
        hidden_states, own.ledger.flow = _dropped(self, own, hidden_states, own.ledger.flow, mask, kwargs)
    given = {"attention_mask": attention_mask, **kwargs, **own.ledger.flow.given}
    made: Tensor = type(self).forward(self, hidden_states, **given)
    if own.last:
        flow, own.ledger.flow = own.ledger.flow, None
        if own.ledger.rooms is None:
            for rows, before in reversed(flow.left):
                stay = rows.sum(dim=1)[:, :, None].to(made.dtype)  # (B, T, 1)
                made = rows.mT.to(made.dtype) @ made + (1 - stay) * before
    return made


def _opened(block: Any, own: Dropping, tokens: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Flow:
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
    asking = last_of(present)
    if own.ledger.asked is not None:
        past = held_by(kwargs.get("past_key_values"), block.get_submodule(own.attention).layer_idx)
        places = torch.arange(count, device=tokens.device) + past
        asking = (places == own.ledger.asked[:, None]).float()
    if own.method == "sparsevlm":
        until = asking.flip(-1).cumsum(dim=-1).flip(-1) > 0  # words of the question, not of an answer behind it
        asking = raters(tokens.detach(), image, present & ~image & until)
    return Flow(present, image, asking, {})


def _dropped(
    block: Any, own: Dropping, tokens: Tensor, flow: Flow, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Flow]:
    """Return the tokens (B, M, C) that are left, and what is known of them."""
    cache = kwargs.get("past_key_values")
    drop, past = own.drops[own.place], held_by(cache, block.get_submodule(own.attention).layer_idx)
    if own.ledger.rooms is not None:
        filled = own.ledger.rooms[own.place]
        room = filled[:, past:]
    else:
        room = room_for(flow.present, flow.image, drop.keep, drop.most)
        filled = remember(cache, own.place, past, room)
    rows = slots_of(flow.present, flow.image, _scores(own, flow, room), room)
    left = rows.to(tokens.dtype) @ tokens
    if own.both_ways and mask is not None:
        # Who sees whom is known only from the mask there was.
        among = (rows @ visible(mask)[:, 0, :, -tokens.shape[1] :].float() @ rows.mT) > 0.5  # (B, M, M)
        earlier = filled[:, None, :past].bool().expand(-1, room.shape[1], -1)
        mask = as_added(torch.cat([earlier, among], dim=-1)[:, None], tokens.dtype)
    else:
        mask = causal_mask(past, room.shape[1], tokens.dtype, filled)
    turns = flow.given.get("position_embeddings", kwargs["position_embeddings"])
    given = {
        "attention_mask": mask,
        "position_embeddings": tuple(rows.to(turn.dtype) @ turn for turn in turns),
        "position_ids": None,
    }
    moved = (rows @ torch.stack([flow.image.float(), flow.asking], dim=-1)).unbind(dim=-1)
    if own.ledger.watched is not None:
        own.ledger.watched.append(rows)
    after = Flow(room.bool(), moved[0] > 0.5, moved[1], given, left=(*flow.left, (rows, tokens)))
    return left, after


def _scores(own: Dropping, flow: Flow, room: Tensor) -> Tensor:
    """Return how much each token (B, T) should stay."""
    if own.method == "random":
        # Each time others: the numbers that are left are small ones again.
        return scattered(flow.image, (*own.drawn[own.place :], *own.drawn[: own.place]))
    if own.method == "grid":
        words = (flow.present & ~flow.image).sum(dim=-1)
        return evenly_spread(flow.image, room.sum(dim=-1) - words)
    if flow.scores is None:
        raise RuntimeError("the attention before this block gave no scores; its config was replaced after dropping")
    return flow.scores[:, -flow.image.shape[1] :]
