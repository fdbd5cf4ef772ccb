"""From what `merge-tokens` is asked for (a share, tokens, multiply-adds, milliseconds, numbers) to what every block merges."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.budget import largest_within
from mmcompress.ops.schedule import (
    Amounts,
    Shape,
    capped,
    check_schedule,
    least_keep,
    solve_keep,
    solve_left,
    spread,
    tokens_after,
)
from mmcompress.views import Block, TokenStream, Tower

if TYPE_CHECKING:
    from mmcompress.passes.merge_tokens import MergeTokens

CLOSE = 12
"""Halvings of the share for a budget of multiply-adds, which cost nothing to count."""


def merging_blocks(tower: Tower) -> tuple[Block, ...]:
    """Return the blocks that can merge tokens: those before the place where they are read."""
    return tower.blocks[: _stream(tower).blocks or None]


def schedule_of(settings: MergeTokens, bundle: Bundle, tower: Tower, amounts: Amounts | None = None) -> list[int]:
    """Return R per block; for a budget of milliseconds, the most that can be merged. Raises UsageError when numbers do not fit.

    `amounts`: for schedule "similar", how many pairs of each block are alike. Before that is known, the numbers are those of
    "constant", as many in all; for a `similarity` they are 0.
    """
    stream, blocks = _stream(tower), len(merging_blocks(tower))
    every, first = settings.every, settings.first
    shape: Shape = "decreasing" if settings.schedule == "decreasing" else "constant"
    if first >= blocks:
        raise UsageError(
            f"merge-tokens.first is {first}, but in the {tower.name} tower {blocks} blocks can merge",
            hint=f"use first <= {blocks - 1}",
        )
    if settings.similarity is not None:
        return [0] * blocks
    if settings.keep_tokens is not None:
        return solve_left(settings.keep_tokens, stream.tokens, stream.protected, blocks, shape, every, first, amounts)
    if settings.macs is not None:
        return _within_macs(settings, bundle, tower, settings.macs, amounts)
    if not settings.merged:
        keep = 0.5 if settings.keep is None else settings.keep
        if settings.latency_ms is not None:
            keep = least_of(settings, tower)
        return solve_keep(keep, stream.tokens, stream.protected, blocks, shape, every, first, amounts)
    if len(settings.merged) == 1:
        return capped(spread(settings.merged[0], blocks, shape, every, first), stream.tokens, stream.protected)
    if len(settings.merged) != blocks:
        raise UsageError(
            f"merge-tokens.merged has {len(settings.merged)} numbers, but in the {tower.name} tower {blocks} blocks can merge",
            hint="give one number per block, or a single one",
        )
    check_schedule(settings.merged, stream.tokens, stream.protected)
    return list(settings.merged)


def macs_kept(bundle: Bundle, tower: Tower, merged: Sequence[int]) -> float:
    """Return the share of the blocks' multiply-adds that is left, those behind the place where tokens are read included."""
    tokens = _stream(tower).tokens
    behind = [tokens] * (len(tower.blocks) - len(merged))
    pairs = [*itertools.pairwise([tokens, *tokens_after(merged, tokens)]), *zip(behind, behind, strict=True)]
    return block_macs(bundle, tower, pairs) / block_macs(bundle, tower, [(tokens, tokens)] * len(tower.blocks))


def _within_macs(
    settings: MergeTokens, bundle: Bundle, tower: Tower, share: float, amounts: Amounts | None
) -> list[int]:
    def schedule(keep: float) -> list[int]:
        return schedule_of(dataclasses.replace(settings, macs=None, keep=keep), bundle, tower, amounts)

    least = least_of(settings, tower)
    found = largest_within(lambda keep: macs_kept(bundle, tower, schedule(keep)), share, least, CLOSE)
    if found is None:
        limit = macs_kept(bundle, tower, schedule(least))
        raise UsageError(
            f"merge-tokens.macs {share:g} is too small: merging all that can be merged leaves {limit:.3f}",
            hint=f"use macs >= {limit + 0.0005:.3f}",
        )
    return schedule(found)


def least_of(settings: MergeTokens, tower: Tower) -> float:
    """Return the smallest share of token work that can be kept."""
    stream = _stream(tower)
    return least_keep(stream.tokens, stream.protected, len(merging_blocks(tower)), settings.every, settings.first)


def _stream(tower: Tower) -> TokenStream:
    assert tower.stream is not None, "check refuses towers without a stream"
    return tower.stream


def block_macs(bundle: Bundle, tower: Tower, tokens: Sequence[tuple[int, int]]) -> int:
    """Return the multiply-adds of the blocks' Linears and attention, given the tokens before and after each one's attention."""
    total = 0
    for block, (before, after) in zip(tower.blocks, tokens, strict=True):
        width = int(bundle.module(block.attention.reader).out_features)  # type: ignore[arg-type]
        inner = (block.attention.heads + block.attention.kv_heads) * block.attention.head_dim
        total += before * 2 * width * inner + 2 * before * before * block.attention.heads * block.attention.head_dim
        assert block.mlp is not None, f"{block.path} has experts, and is in a tower whose tokens are merged"
        total += after * width * block.mlp.neurons * (len(block.mlp.writers) + 1)
    return total
