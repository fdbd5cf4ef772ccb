"""A language model whose prompts lose image tokens on their way through its blocks.

`bind` gives some blocks of the instance a `forward` of their own, and so to an attention in front of each place where tokens leave:
it says how much each token is looked at. The model around them notes which tokens are a picture's. Blocks behind such a place are
called with the tokens that are left, the positions those had from the start, and a mask of their own; their caches of keys and
values hold no others. Behind the last block every token stands in its place again, those that left as they were then, so
that whoever reads the output at some place finds what belongs there.

Or they leave the caches alone, once the prompt has been read: then the prompt's tokens see all others in every block, and what
follows sees those that are left. Before that they may skip the feed-forwards of those blocks, which add nothing to them then, and
cost nothing. Source: Skip-Vision, arXiv 2503.21817 (Skip-FFN and Skip-KV). Deliberate difference: a score says which tokens
skip, where the paper trains with a coarse picture beside a fine one that skips.

What the blocks of one call tell each other lies in a `PromptLedger`; what an answer's next call must know, beside the cache (see
`cache_lengths`).

Shapes: B batch, T tokens, P past tokens, C channels, M tokens left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops.dropping import counts_kept, room_for
from mmcompress.ops.masks import as_added, causal_mask, visible
from mmcompress.surgery.attention import give_asked
from mmcompress.surgery.cache_lengths import CACHE, change_held
from mmcompress.surgery.noting import note_images
from mmcompress.surgery.prompt_flow import SCORED, Chosen, Dropping, Flow, chosen, opened
from mmcompress.surgery.token_operators import floats, integers

ATTRIBUTE = "dropping"
SKIPPING = "skipping"
"""Attribute of a feed-forward that some tokens skip."""


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
        block.forward = MethodType(_forget if own.in_cache and place >= 0 else _leave, block)
        if own.mlp and place >= 0:
            feed = block.get_submodule(own.mlp)
            setattr(feed, SKIPPING, mine)
            feed.forward = MethodType(_skip, feed)
    setattr(model, ATTRIBUTE, own)
    note_images(model, images, own.ledger)


def dropping_of(model: nn.Module) -> Dropping | None:
    """Return how the prompts of a model lose tokens, None where they do not; `model` is the one `bind` was given."""
    found: Dropping | None = getattr(model, ATTRIBUTE, None)
    return found


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


def _attend(self: Any, *args: Any, **kwargs: Any) -> Any:
    own: Dropping = getattr(self, ATTRIBUTE)
    flow = own.ledger.flow
    assert flow is not None, "the first block opens it"
    made = type(self).forward(self, *args, asking=flow.asking, **kwargs)
    own.ledger.flow = flow._replace(scores=made[1].detach())
    return made


def _leave(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Forward of a block: some tokens may leave before it, and behind the last one all stand in their places."""
    own, flow = _begun(self, hidden_states, attention_mask, kwargs)
    if own.starts and not own.in_cache:
        mask = flow.given.get("attention_mask", attention_mask)
        hidden_states, flow = _without(self, own, hidden_states, flow, mask, kwargs)
    own.ledger.flow = flow
    made: Tensor = type(self).forward(self, hidden_states, **{"attention_mask": attention_mask, **kwargs, **flow.given})
    if own.last and own.ledger.rooms is None:
        for rows, before in reversed(flow.left):
            stay = rows.sum(dim=1)[:, :, None].to(made.dtype)  # (B, T, 1)
            made = rows.mT.to(made.dtype) @ made + (1 - stay) * before
    return made


def _forget(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Forward of a block that computes with all tokens, and whose cache then holds those that are left."""
    own, flow = _begun(self, hidden_states, attention_mask, kwargs)
    cache = kwargs.get(CACHE)
    if own.starts:
        flow = flow._replace(stays=chosen(self, own, flow, hidden_states, cache))
    own.ledger.flow = flow
    assert flow.stays is not None, "the place is before this block"
    mask = _mask_beside(flow, flow.stays, attention_mask, hidden_states)
    made: Tensor = type(self).forward(self, hidden_states, attention_mask=mask, **kwargs)
    if cache is not None and (torch.compiler.is_exporting() or hidden_states.shape[1] > 1):
        held = cache.layers[self.get_submodule(own.attention).layer_idx]
        change_held(held, partial(_cut, stays=flow.stays))
    return made


def _skip(self: Any, hidden_states: Tensor) -> Tensor:
    """Forward of a feed-forward (B, T, C) that is given those alone that are left, and says 0 of the others."""
    own: Dropping = getattr(self, SKIPPING)
    flow = own.ledger.flow
    assert flow is not None, "the first block opens it"
    assert flow.stays is not None, "the place is before this block"
    rows = flow.stays.rows.to(hidden_states.dtype)
    made: Tensor = rows.mT @ type(self).forward(self, rows @ hidden_states)
    return made


def _begun(block: Any, tokens: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[Dropping, Flow]:
    """Return what a block has to do, and what is known when it begins. Raises UsageError for what it cannot do."""
    own: Dropping = getattr(block, ATTRIBUTE)
    if block.training and getattr(block, "gradient_checkpointing", False):
        raise UsageError(
            "a model that drops image tokens cannot be trained with gradient checkpointing",
            hint="call model.activation_checkpointing_disable(), or train before dropping",
        )
    way = getattr(block.get_submodule(own.attention).config, "_attn_implementation", None) or ""
    if way.startswith(("flash", "flex")):
        raise UsageError(
            f"a model that drops image tokens computes attention by {way}, which takes no mask for each token",
            hint='set the attention implementation to "sdpa" or "eager"',
        )
    flow = opened(block, own, tokens, mask, kwargs) if own.first else own.ledger.flow
    assert flow is not None, "the first block opens it"
    own.ledger.flow = flow
    return own, flow


def _without(
    block: Any, own: Dropping, tokens: Tensor, flow: Flow, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Flow]:
    """Return the tokens (B, M, C) that are left, and what is known of them."""
    rows, shares, room, filled, past = chosen(block, own, flow, tokens, kwargs.get(CACHE))
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
    left = (*flow.left, (rows, tokens))
    answer = None if flow.answer is None else _moved(flow.answer, rows) > 0.5
    return shares.to(tokens.dtype) @ tokens, Flow(
        room.bool(), _moved(flow.image, rows) > 0.5, _moved(flow.asking, rows), given, left=left, answer=answer
    )


def _moved(known: Tensor, rows: Tensor) -> Tensor:
    """Return what is `known` of tokens (B, T) of those that are left (B, M).

    Not by a matmul, which has no values while multiply-adds are counted: how many leave next depends on how many there are.
    """
    return (rows * known[:, None]).sum(dim=-1)


def _mask_beside(flow: Flow, stays: Chosen, mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the mask (B, 1, T, P + T) of tokens that see each other as before, and of the past what is held.

    Where an answer follows in the same row, its tokens do not see those that are gone by then.
    """
    count = tokens.shape[1]
    among = visible(causal_mask(0, count, tokens.dtype, flow.present) if mask is None else mask)[:, 0, :, -count:]
    if flow.answer is not None:
        among = among & ~(flow.answer[:, :, None] & flow.image[:, None, :] & (stays.rows.sum(dim=1) == 0)[:, None, :])
    earlier = stays.filled[:, None, : stays.past].bool().expand(-1, count, -1)
    return as_added(torch.cat([earlier, among.expand(earlier.shape[0], -1, -1)], dim=-1)[:, None], tokens.dtype)


def _cut(held: Tensor, stays: Chosen) -> Tensor:
    """Return keys or values (B, H, P + M, D) of those that are left, from all (B, H, P + T, D), or their codes or scales."""
    earlier, new = held[:, :, : stays.past], held[:, :, stays.past :]
    rows = stays.rows[:, None]  # of zeros and a single one: exact for integers too
    left = rows.to(held.dtype) @ new if held.is_floating_point() else integers(rows @ floats(new, rows))
    return torch.cat([earlier, left], dim=2)
