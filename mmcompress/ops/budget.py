"""How much of something it takes: the share a budget of multiply-adds or milliseconds leaves, the fewest that are enough."""

from __future__ import annotations

from collections.abc import Callable


def largest_within(cost: Callable[[float], float], budget: float, least: float, steps: int) -> float | None:
    """Return the largest share from `least` to 1 whose cost is within `budget`, None where that of `least` is not.

    Costs must grow with the share. Found by halving, so it is exact to (1 - least) / 2 ** steps; a share is asked for once.
    """
    if cost(1.0) <= budget:
        return 1.0
    if cost(least) > budget:
        return None
    low, high = least, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def fewest(count: int, enough: Callable[[int], bool]) -> int:
    """Return the least number, from 0 to `count`, that is enough; `count` where none is.

    A number above one that is enough must be enough, too. Asked by doubling, then by halving: few numbers cost what one after the
    other costs, many about 2 log2 of them.
    """
    low, high = -1, 0
    while high < count and not enough(high):
        low, high = high, min(count, 2 * high + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
