"""How many tokens each block removes.

A schedule is a list of R, one per block: R tokens disappear between the block's attention and its MLP. At most half of the
unprotected tokens can disappear at once, because every removed token needs a partner (see `matching`).

`solve_keep` turns a share into a schedule. The share is that of *token work*: the tokens entering the MLPs, averaged over
the blocks and divided by N. So keep 0.5 is about half the encoder's time, which is what people ask for; it leaves far fewer
than half of the tokens after the last block (a constant schedule over 12 blocks of 65 tokens ends with 5 or so).

Sources: ToMe, arXiv 2210.09461, section 4 (constant and decreasing schedules; R cut at half). Unlike ToMe, a solved schedule
may differ by one token from block to block, so that the share is met exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mmcompress.errors import UsageError

Shape = Literal["constant", "decreasing"]


def largest_merge(tokens: int, protected: int) -> int:
    """Return the most tokens one block can remove: half of the unprotected ones."""
    return max(0, (tokens - protected) // 2)


def constant(merged: int, blocks: int) -> list[int]:
    """Return R in every block."""
    return [merged] * blocks


def decreasing(merged: int, blocks: int) -> list[int]:
    """Return R falling linearly from 2 * merged to 0, rounded down; on average about `merged`."""
    if blocks == 1:
        return [merged]
    return [int(2 * merged - 2 * merged / (blocks - 1) * index) for index in range(blocks)]


def capped(schedule: Sequence[int], tokens: int, protected: int) -> list[int]:
    """Return the schedule with every R cut to what its block can remove."""
    made = []
    for wanted in schedule:
        made.append(min(wanted, largest_merge(tokens, protected)))
        tokens -= made[-1]
    return made


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


def solve_keep(keep: float, tokens: int, protected: int, blocks: int, shape: Shape = "constant") -> list[int]:
    """Return the schedule that keeps the share `keep` of the token work (see the module's docstring).

    Where no block reaches its cap, the tokens entering the MLPs add up to keep * N * L, rounded; otherwise their mean is within
    one token of keep * N, never below. keep = 1 gives all zeros. Raises UsageError, naming the smallest possible share, when
    even halving in every block is too little.
    """
    removed = round((1 - keep) * tokens * blocks)
    largest = capped([tokens] * blocks, tokens, protected)
    if removed > _removed(largest):
        limit = kept_share(largest, tokens)
        raise UsageError(
            f"keep {keep:g} is too small: {blocks} blocks on {tokens} tokens keep at least {limit:.3f} when each removes half",
            hint=f"use keep >= {limit + 0.0005:.3f}",
        )
    slope = [1.0] * blocks
    if shape == "decreasing" and blocks > 1:
        slope = [2 * (1 - index / (blocks - 1)) for index in range(blocks)]

    def scaled(scale: float) -> list[int]:
        return capped([int(scale * part) for part in slope], tokens, protected)

    low, high = 0.0, float(tokens)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _removed(scaled(middle)) <= removed else (low, middle)
    return _closed(scaled(low), [low * part for part in slope], removed, tokens, protected)


def _removed(schedule: Sequence[int]) -> int:
    """Token work removed: one token removed in block l is missing from the MLPs of blocks l … L-1."""
    return sum(merged * (len(schedule) - index) for index, merged in enumerate(schedule))


def _closed(schedule: list[int], ideal: list[float], removed: int, tokens: int, protected: int) -> list[int]:
    """Remove single tokens until `removed` is met: where R is lowest beside the ideal, and there as early as does not overshoot."""
    while (done := _removed(schedule)) < removed:
        fitting = []
        for index, part in enumerate(ideal):
            raised = [*schedule[:index], schedule[index] + 1, *schedule[index + 1 :]]
            tried = capped(raised, tokens, protected)
            if done < _removed(tried) <= removed:
                fitting.append((schedule[index] - part, -_removed(tried), tried))
        if not fitting:
            break
        schedule = min(fitting)[2]
    return schedule
