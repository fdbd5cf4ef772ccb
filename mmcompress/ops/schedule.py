"""How many tokens each block removes.

A schedule is a list of R, one per block: R tokens disappear between the block's attention and its MLP. At most half of the
unprotected tokens can disappear at once, because every removed token needs a partner (see `matching`).

`solve_keep` turns a share into a schedule. The share is that of *token work*: the tokens entering the MLPs, averaged over
the blocks and divided by N. So keep 0.5 is about half the encoder's time, which is what people ask for; it leaves far fewer
than half of the tokens after the last block (a constant schedule over 12 blocks of 65 tokens ends with 5 or so).

Matching costs the same however many tokens it merges, so where blocks are cheap (few tokens, 8 bits) fewer and larger merges are
faster: `every` = 3 merges in the first, fourth, … block only, or in every third from the block `first` on.

Sources: ToMe, arXiv 2210.09461, section 4 (constant and decreasing schedules; R cut at half). Unlike ToMe, a solved schedule
may differ by one token from block to block, so that the share is met exactly. EViT, arXiv 2202.07800, section 3.4: training begins
with all tokens and comes down to the schedule along half a cosine (`annealed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from mmcompress.errors import UsageError

Shape = Literal["constant", "decreasing"]
Amounts = Callable[[float], list[float]]
"""What each block should merge, by a scale: nothing at 0, and never less for a larger one. In place of a shape."""
ALL = 2.5
"""The scale of `Amounts` at which each block merges all that is alike at all."""


def largest_merge(tokens: int, protected: int) -> int:
    """Return the most tokens one block can remove: half of the unprotected ones."""
    return max(0, (tokens - protected) // 2)


def slope(shape: Shape, blocks: int, every: int = 1, first: int = 0) -> list[float]:
    """Return each block's share of R: 1 everywhere, or falling linearly from 2 to 0; 0 but in every `every`-th from `first` on."""
    falls = shape == "decreasing" and blocks > 1
    parts = [2 - 2 / (blocks - 1) * index if falls else 1.0 for index in range(blocks)]
    active = range(first, blocks, every)
    return [part if index in active else 0.0 for index, part in enumerate(parts)]


def spread(merged: int, blocks: int, shape: Shape = "constant", every: int = 1, first: int = 0) -> list[int]:
    """Return `merged` in every block, or on average about that, falling to 0 and rounded down."""
    # Rounding first: 11 * (2 - 2 / 11) must be 20 and not 19.999….
    return [int(round(merged * part, 9)) for part in slope(shape, blocks, every, first)]


def capped(schedule: Sequence[int], tokens: int, protected: int) -> list[int]:
    """Return the schedule with every R cut to what its block can remove."""
    made = []
    for wanted in schedule:
        made.append(min(wanted, largest_merge(tokens, protected)))
        tokens -= made[-1]
    return made


def annealed(merged: int, progress: float) -> int:
    """Return how many of its R merges a block makes when `progress` (0..1) of the annealing is over: none at first, then all."""
    return int(merged * 0.5 * (1 - math.cos(math.pi * min(1.0, progress))) + 0.5)


def tokens_after(schedule: Sequence[int], tokens: int) -> list[int]:
    """Return the tokens entering each block's MLP (= leaving the block)."""
    left = []
    for merged in schedule:
        tokens -= merged
        left.append(tokens)
    return left


def kept_share(schedule: Sequence[int], tokens: int) -> float:
    """Return the share of token work a schedule keeps: the mean of `tokens_after` over N."""
    return sum(tokens_after(schedule, tokens)) / (tokens * len(schedule))


def check_schedule(schedule: Sequence[int], tokens: int, protected: int) -> None:
    """Raise UsageError naming the first block that is asked to remove more than it can, or a negative number."""
    for index, merged in enumerate(schedule):
        limit = largest_merge(tokens, protected)
        if not 0 <= merged <= limit:
            raise UsageError(
                f"block {index} has {tokens} tokens ({protected} protected) and cannot merge {merged}; the limit is {limit}",
                hint="give smaller numbers, or keep=… to have them solved",
            )
        tokens -= merged


def least_keep(tokens: int, protected: int, blocks: int, every: int = 1, first: int = 0) -> float:
    """Return the smallest share of token work that can be kept: every block that merges halves."""
    largest = [tokens if index in range(first, blocks, every) else 0 for index in range(blocks)]
    return kept_share(capped(largest, tokens, protected), tokens)


def solve_left(
    left: int,
    tokens: int,
    protected: int,
    blocks: int,
    shape: Shape = "constant",
    every: int = 1,
    first: int = 0,
    amounts: Amounts | None = None,
) -> list[int]:
    """Return the schedule after which `left` tokens are left, protected ones included.

    R follows `slope`, or `amounts`, as nearly as whole numbers and halving allow. Raises UsageError, naming the fewest tokens there
    can be, when halving is too little, and where more are asked for than there are.
    """
    parts = slope(shape, blocks, every, first)
    active = range(first, blocks, every)
    fewest = _halved(tokens, protected, len(active))
    if not fewest <= left <= tokens:
        raise UsageError(
            f"{left} tokens cannot be left of {tokens}: merging in {len(active)} of {blocks} blocks leaves {fewest} at least",
            hint=f"keep {fewest} to {tokens}",
        )
    if amounts is not None:
        at, _ = _largest_scale(amounts, tokens, protected, sum, tokens - left, ALL)
        parts = [part if index in active else 0.0 for index, part in enumerate(amounts(at))]
    made = [0] * blocks
    for place, index in enumerate(active):
        ahead = sum(parts[index::every])
        wanted = round((tokens - left) * parts[index] / ahead) if ahead else tokens - left
        made[index] = min(wanted, largest_merge(tokens, protected))
        while _halved(tokens - made[index], protected, len(active) - place - 1) > left:
            made[index] += 1
        tokens -= made[index]
    return made


def _halved(tokens: int, protected: int, times: int) -> int:
    """Return the fewest tokens that can be left after so many merges."""
    for _ in range(times):
        tokens -= largest_merge(tokens, protected)
    return tokens


def solve_keep(
    keep: float,
    tokens: int,
    protected: int,
    blocks: int,
    shape: Shape = "constant",
    every: int = 1,
    first: int = 0,
    amounts: Amounts | None = None,
) -> list[int]:
    """Return the schedule that keeps the share `keep` of the token work (see the module's docstring).

    R follows `slope`, or `amounts`.

    Where every block merges and none reaches its cap, the tokens entering the MLPs add up to keep * N * L, rounded; otherwise
    their mean is within one token of keep * N, never below. keep = 1 gives all zeros. Raises UsageError, naming the smallest
    possible share, when halving is too little.
    """
    removed = round((1 - keep) * tokens * blocks)
    parts = slope(shape, blocks, every, first)
    active = range(first, blocks, every)
    limit = least_keep(tokens, protected, blocks, every, first)
    if removed > round((1 - limit) * tokens * blocks):
        raise UsageError(
            f"keep {keep:g} is too small: merging in {len(active)} of {blocks} blocks, half of {tokens} tokens at a time, "
            f"keeps {limit:.3f}",
            hint=f"use keep >= {limit + 0.0005:.3f}" + (" or a smaller every or first" if every > 1 or first else ""),
        )

    if amounts is None:
        high, amounts = float(tokens * every), lambda scale: [scale * part for part in parts]
    else:
        high = ALL
    at, schedule = _largest_scale(amounts, tokens, protected, _removed, removed, high)
    wanted = amounts(at)
    return _closed(schedule, {index: wanted[index] for index in active}, removed, tokens, protected)


def _largest_scale(
    amounts: Amounts, tokens: int, protected: int, work: Callable[[list[int]], int], most: int, high: float
) -> tuple[float, list[int]]:
    """Return the largest scale up to `high` whose amounts, rounded down and capped, are `most` of `work`, and their schedule."""

    def scaled(scale: float) -> list[int]:
        return capped([int(part) for part in amounts(scale)], tokens, protected)

    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if work(scaled(middle)) <= most else (low, middle)
    return low, scaled(low)


def _removed(schedule: Sequence[int]) -> int:
    """Token work removed: one token removed in block l is missing from the MLPs of blocks l … L-1."""
    return sum(merged * (len(schedule) - index) for index, merged in enumerate(schedule))


def _closed(schedule: list[int], ideal: dict[int, float], removed: int, tokens: int, protected: int) -> list[int]:
    """Remove single tokens until `removed` is met: where R is lowest beside the ideal, and there as early as does not overshoot."""
    while (done := _removed(schedule)) < removed:
        fitting = []
        for index, part in ideal.items():
            raised = [*schedule[:index], schedule[index] + 1, *schedule[index + 1 :]]
            tried = capped(raised, tokens, protected)
            if done < _removed(tried) <= removed:
                fitting.append((schedule[index] - part, -_removed(tried), tried))
        if not fitting:
            break
        schedule = min(fitting)[2]
    return schedule
