"""How much each group of layers gives up, by evolution: allocations that keep a budget exactly, bred by what is measured of them.

A population of allocations begins with given ones. Of two parents, each the better of a few drawn, a child takes the share of every
group from either one, or from the first alone; then cost is moved from some groups to others, and the child is brought back to the
budget. It is measured once; the best stay. So the result is never worse, by that measure, than the best of the given ones, and the
same seed gives the same result.

Sources and deliberate differences: MetaPruning (Liu et al. 2019) and ViT-ResNAS (Liao et al. 2021) search widths by mutation and
crossover, and throw away what misses the budget; here it is repaired.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmcompress.ops.allocation import Removal

POPULATION = 10
DRAWN = 3
"""Of how many members the best becomes a parent."""
FARTHEST = 4
"""At most such a part of what a group can give up is moved at once."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    gone: tuple[int, ...]
    """The best allocation: chunks that go of each group of a `Removal`."""
    damage: float
    started: tuple[float, ...]
    """The damage of the given ones, in their order."""
    evaluations: int
    history: list[float] = field(default_factory=list)
    """The damage of everything that was measured, in order."""


def evolve(
    removal: Removal,
    remove: int,
    starts: Sequence[Sequence[int]],
    damage: Callable[[Sequence[int]], float],
    evaluations: int,
    seed: int,
) -> Found:
    """Return the allocation of least `damage` among at most `evaluations` measured, all of which remove at least `remove`."""
    chance = random.Random(seed)
    known: dict[tuple[int, ...], float] = {}
    history: list[float] = []

    def measured(gone: tuple[int, ...]) -> float:
        if gone not in known:
            known[gone] = damage(gone)
            history.append(known[gone])
        return known[gone]

    began = tuple(measured(tuple(start)) for start in starts)
    fruitless = 0
    while len(known) < evaluations and fruitless < 100:
        alive = sorted(known, key=lambda gone: (known[gone], gone))[:POPULATION]
        first, second = (min(chance.choices(range(len(alive)), k=DRAWN)) for _ in range(2))
        child = _moved(removal, _crossed(alive[first], alive[second], chance), chance)
        made = tuple(removal.within(child, remove, chance.choice))
        fruitless = fruitless + 1 if made in known else 0
        measured(made)
    best = min(known, key=lambda gone: (known[gone], gone))
    return Found(best, known[best], began, len(known), history)


def _crossed(one: Sequence[int], other: Sequence[int], chance: random.Random) -> list[int]:
    """Return the shares of `one`, or half of the time each of them from either parent."""
    if chance.random() < 0.5:
        return list(one)
    return [chance.choice(pair) for pair in zip(one, other, strict=True)]


def _moved(removal: Removal, gone: Sequence[int], chance: random.Random) -> list[int]:
    """Return `gone` where some groups give up more, and others as much less, to within a chunk."""
    moved = list(gone)
    for _ in range(1 + chance.randrange(3)):
        giving = [group for group, queue in enumerate(removal.chunks) if moved[group] < len(queue)]
        getting = [group for group, count in enumerate(moved) if count]
        if not giving or not getting:
            return moved
        more, less = chance.choice(giving), chance.choice(getting)
        queue = removal.chunks[more]
        step = min(len(queue) - moved[more], chance.randint(1, max(1, len(queue) // FARTHEST)))
        freed = sum(chunk.cost for chunk in queue[moved[more] : moved[more] + step])
        moved[more] += step
        while less != more and moved[less] and removal.chunks[less][moved[less] - 1].cost <= freed:
            moved[less] -= 1
            freed -= removal.chunks[less][moved[less]].cost
    return moved
