"""Which units to remove so that a budget holds: a greedy knapsack over exact integer costs, then an exact repair.

Units come in *layers* (one kind of unit in one block), all of one cost. Inside a layer the least valuable go first, in chunks
that leave a width kernels like; a layer never goes below its bound. Over all layers, chunks go in order of value per cost
until the budget holds. The last chunk may overshoot, so chunks that still fit are put back, the most valuable first, until the
cheapest one that could come back does not fit. Hence

- the cost left is at most the budget and within one (cheapest restorable) chunk of it;
- where all costs are equal it is a global sort by score;
- the value lost exceeds the optimum's by less than one chunk (the fractional relaxation bounds the optimum from below).

A queue's chunks must go in their order, and a later one may be worth less for its cost than an earlier one: the first step
from a matrix to two factors saves little and costs much. Such a chunk goes together with those behind it that make it worth
while (their lower convex hull); "one chunk" above is then the largest of these steps.

Ties are broken by the order of layers, then by index, so the result does not depend on the platform's sort.

`allocate_evenly` takes the same share of every layer instead: the plain baseline. `ops.evolution` searches from both.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

TINY = 1e-9
"""Values per cost that differ by less, relatively, are equal but for rounding."""


@dataclass(frozen=True)
class Layer:
    """Units of one kind in one block."""

    values: tuple[float, ...]
    """What each unit is worth, in a currency shared by all layers."""
    cost: int
    """Exact cost of one unit in the budget's measure."""
    bound: int
    """Units that must stay."""
    multiple: int = 1
    """The number kept is a multiple of this, or all."""
    tie: str = ""
    """Layers with the same non-empty tie keep the same number of units."""


@dataclass(frozen=True)
class Chunk:
    """What goes together: `width` units of every tied layer; `value` is the sum over them."""

    value: float
    cost: int
    width: int


def smallest_width(layer: Layer) -> int:
    """Return how many units `layer` keeps at least: the bound, rounded up to the multiple, at most all of them."""
    units = len(layer.values)
    rounded = -(-layer.bound // layer.multiple) * layer.multiple
    return min(units, rounded)


def removable_cost(layers: Sequence[Layer]) -> int:
    """Return the largest cost that can be removed from `layers` within their bounds."""
    return sum(layer.cost * (len(layer.values) - smallest_width(layer)) for layer in layers)


def allocate(layers: Sequence[Layer], remove: int) -> list[list[int]]:
    """Return the kept indices of each layer, ascending, such that at least `remove` of the cost is gone.

    Raises ValueError when `remove` exceeds `removable_cost` or when tied layers differ in width.
    """
    removal = Removal(layers)
    return removal.kept(removal.greedy(remove))


def allocate_evenly(layers: Sequence[Layer], remove: int) -> list[list[int]]:
    """Return what `allocate` does, where every layer gives up the same share of its units: values only order those of a layer.

    Shares are as equal as chunks allow: what is left is within one chunk of the budget here too.
    """
    return allocate(evenly(layers), remove)


def evenly(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers with values by which chunks go in the order of the share of their layer that is gone by then."""
    made = []
    for layer in layers:
        units = len(layer.values)
        shares = [0.0] * units
        for place, unit in enumerate(_order(layer)):
            shares[unit] = layer.cost * (place + 0.5) / units
        made.append(replace(layer, values=tuple(shares)))
    return made


class Removal:
    """What can go of some layers, chunk by chunk, and in which order inside each group of tied layers.

    How much goes is a count of chunks for each group, `gone`: what searches change.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Raises ValueError when tied layers differ in width."""
        self.layers = layers
        self.order = [_order(layer) for layer in layers]
        self.groups = _groups(layers)
        self.chunks = [_chunks(layers, members, self.order) for members in self.groups]

    def removed(self, gone: Sequence[int]) -> int:
        """Return the cost of what is gone."""
        return sum(chunk.cost for queue, count in zip(self.chunks, gone, strict=True) for chunk in queue[:count])

    def greedy(self, remove: int) -> list[int]:
        """Return what goes in order of value per cost. Raises ValueError when `remove` exceeds what can go."""
        if remove > removable_cost(self.layers):
            raise ValueError(f"{remove} to remove, {removable_cost(self.layers)} removable")
        return spend(self.chunks, remove)

    def within(self, gone: Sequence[int], remove: int, pick: Callable[[Sequence[int]], int]) -> list[int]:
        """Return `gone` brought to the budget: while too little goes, one more chunk of a group; then chunks are put back that need
        not go. `pick` chooses of the groups that can.
        """
        fitted = list(gone)
        while (removed := self.removed(fitted)) < remove:
            fitted[pick([group for group, queue in enumerate(self.chunks) if fitted[group] < len(queue)])] += 1
        _restore(self.chunks, fitted, removed - remove, pick)
        return fitted

    def kept(self, gone: Sequence[int]) -> list[list[int]]:
        """Return the kept indices of each layer, ascending."""
        kept: list[list[int]] = [[] for _ in self.layers]
        for members, queue, count in zip(self.groups, self.chunks, gone, strict=True):
            width = sum(chunk.width for chunk in queue[:count])
            for member in members:
                kept[member] = sorted(self.order[member][width:])
        return kept


def _order(layer: Layer) -> list[int]:
    """Return the units of a layer, the least valuable first."""
    return sorted(range(len(layer.values)), key=lambda unit: (layer.values[unit], unit))


def spend(queues: Sequence[Sequence[Chunk]], remove: int) -> list[int]:
    """Return how many chunks of each queue go, first to last, such that at least `remove` of the cost is gone.

    `remove` must be no more than all chunks cost.
    """
    steps = [_steps(queue) for queue in queues]
    gone, taken, removed = [0] * len(queues), [0] * len(queues), 0
    heap = [(_density(own[0]), index) for index, own in enumerate(steps) if own]
    heapq.heapify(heap)
    while removed < remove and heap:
        _, index = heapq.heappop(heap)
        step = steps[index][taken[index]]
        removed += step.cost
        gone[index] += step.width
        taken[index] += 1
        if taken[index] < len(steps[index]):
            heapq.heappush(heap, (_density(steps[index][taken[index]]), index))
    _restore(queues, gone, removed - remove)
    return gone


def _steps(queue: Sequence[Chunk]) -> list[Chunk]:
    """Return the chunks joined such that none is worth less for its cost than the one before; `width` then counts chunks."""
    joined: list[Chunk] = []
    for chunk in queue:
        joined.append(Chunk(chunk.value, chunk.cost, 1))
        # Equal but for rounding is no reason to join.
        while len(joined) > 1 and _density(joined[-1]) < (1 - TINY) * _density(joined[-2]):
            last, before = joined.pop(), joined.pop()
            joined.append(Chunk(before.value + last.value, before.cost + last.cost, before.width + last.width))
    return joined


def _groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Return the indices of layers that move together."""
    groups: list[list[int]] = []
    ties: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.tie and layer.tie in ties:
            ties[layer.tie].append(index)
            if len(layers[ties[layer.tie][0]].values) != len(layer.values):
                raise ValueError(f"layers tied by '{layer.tie}' differ in width")
            continue
        groups.append([index])
        if layer.tie:
            ties[layer.tie] = groups[-1]
    return groups


def _chunks(layers: Sequence[Layer], members: list[int], order: list[list[int]]) -> list[Chunk]:
    """Return what can go, first to last. The first chunk brings an odd width down to a multiple."""
    units = len(layers[members[0]].values)
    multiple = max(layers[member].multiple for member in members)
    floor = max(smallest_width(layers[member]) for member in members)
    made, start = [], 0
    while start < units:
        width = (units - start) % multiple or multiple
        if units - start - width < floor:
            break
        values = (layers[m].values[unit] for m in members for unit in order[m][start : start + width])
        made.append(Chunk(sum(values), sum(layers[m].cost for m in members) * width, width))
        start += width
    return made


def _density(chunk: Chunk) -> float:
    return chunk.value / chunk.cost if chunk.cost else float("inf")


def _restore(
    queues: Sequence[Sequence[Chunk]], gone: list[int], slack: int, pick: Callable[[Sequence[int]], int] | None = None
) -> None:
    """Put back the last removed chunks that fit into `slack`, the densest first or as `pick` chooses; changes `gone`."""
    while True:
        fitting = [
            (-density, index, count, cost)
            for index, queue in enumerate(queues)
            for density, count, cost in _returning(queue[: gone[index]], slack)
        ]
        if not fitting:
            return
        chosen = pick([index for _, index, _, _ in fitting]) if pick else min(fitting)[1]
        _, index, count, cost = next(found for found in fitting if found[1] == chosen)
        gone[index] -= count
        slack -= cost


def _returning(removed: Sequence[Chunk], slack: int) -> list[tuple[float, int, int]]:
    """Return the best that can come back of a queue within `slack`, as (value per cost, chunks, cost): none or one."""
    best: tuple[float, int, int] | None = None
    value, cost = 0.0, 0
    for count, chunk in enumerate(reversed(removed), 1):
        value, cost = value + chunk.value, cost + chunk.cost
        if cost > slack:
            break
        density = _density(Chunk(value, cost, count))
        if best is None or density > (1 + TINY) * best[0]:
            best = density, count, cost
    return [best] if best else []
