"""Binding a tower's blocks to a schedule of merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.ops.schedule import tokens_after
from mmcompress.passes.merge_schedule import merging_blocks
from mmcompress.surgery.merging import bind_block, bind_pool
from mmcompress.surgery.reduction import Method, Reduction, TokenLedger
from mmcompress.views import Tower


def bind_tower(
    bundle: Bundle,
    tower: Tower,
    merged: Sequence[int],
    method: Method | Literal["random"],
    proportional: bool,
    kept: Sequence[Sequence[int]] = (),
) -> None:
    """Make the blocks of `tower` merge as many tokens each as `merged` says; for "random", leave the places `kept`."""
    stream = tower.stream
    assert stream is not None, "check refuses towers without a stream"
    restore = stream.readout in ("mean", "all")
    ledger = TokenLedger()
    before = [stream.tokens, *tokens_after(merged, stream.tokens)]
    for index, (block, removed) in enumerate(zip(merging_blocks(tower), merged, strict=True)):
        dropping = bool(kept) and removed > 0
        last = index == len(merged) - 1
        bind_block(
            bundle.module(block.path),
            Reduction(
                attend=block.attend,
                attention=block.attention.path.removeprefix(block.path + "."),
                feed=block.feed,
                merged=0 if method == "random" else removed,
                method="tome" if method == "random" else method,
                depth=index / len(merged),
                kept=tuple(kept[index]) if dropping else (),
                tokens=before[index],
                protected=stream.protected,
                proportional=proportional,
                first=index == 0,
                last=last,
                pooled=stream.readout == "attention",
                restore=restore,
                survivors=_survivors(kept, stream.tokens) if kept and last else (),
                original=stream.tokens,
                ledger=ledger,
            ),
        )
    if stream.readout == "attention":
        pool = bundle.module(stream.pool)
        assert isinstance(pool, nn.MultiheadAttention), "TokenStream.pool names a MultiheadAttention"
        bind_pool(pool, ledger, proportional=proportional)


def _survivors(kept: Sequence[Sequence[int]], tokens: int) -> tuple[int, ...]:
    """Return the original positions that are left after all blocks."""
    left = list(range(tokens))
    for positions in kept:
        left = [left[position] for position in positions]
    return tuple(left)
