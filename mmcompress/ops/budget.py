"""Which share to keep when what is given is a budget: multiply-adds, or milliseconds on this machine."""

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
