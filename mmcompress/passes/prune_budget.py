"""The budget of `prune`: how much must go from which towers, which of the units pay for it, and errors when they cannot.

A *pool* is a set of towers under one budget. Without per-tower ratios there is one pool, which is what lets one tower pay for
another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops import allocation, importance
from mmcompress.ops.allocation import Layer
from mmcompress.ops.progressive import standardised
from mmcompress.passes.prune_units import Group

Allocator = Callable[[Sequence[Group], Sequence[Layer], int], list[list[int]]]
"""(groups, the same as the allocator sees them, cost that has to go) -> kept units of each."""


@dataclass(frozen=True)
class Pool:
    """Towers that share a budget: `total` now, at least `remove` of it to go."""

    towers: tuple[str, ...]
    total: int
    remove: int
    asked: str
    """How the user said it: "ratio 0.5" or "target 3,000,000"."""


@dataclass(frozen=True)
class Bounds:
    """What has to stay in a group, and how groups hang together."""

    min_keep: float
    multiple: int
    uniform: bool
    depths: Mapping[str, int]
    """Blocks per tower, protected ones included."""

    def layer(self, group: Group, values: Sequence[float], measure: str) -> Layer:
        """Return the group as the allocator sees it."""
        tie = f"{group.tower}.{group.kind}.{group.part}" if self.uniform and group.kind != "blocks" else ""
        bound = 0 if group.kind == "blocks" else max(group.least, share(self.min_keep, group.units))
        multiple = self.multiple if group.kind in ("neurons", "head-dims") else 1
        return Layer(tuple(values), group.price(measure), bound, multiple, tie)

    def smallest(self, group: Group, measure: str) -> int:
        """Return how many units of the group stay at least."""
        return allocation.smallest_width(self.layer(group, [0.0] * group.units, measure))


def share(fraction: float, count: int) -> int:
    """Return `fraction` of `count`, rounded up exactly as written in decimals, at least 1."""
    return max(1, math.ceil(Fraction(str(fraction)) * count))


def pools(totals: Mapping[str, int], ratio: float, target: float | None, ratios: Mapping[str, float]) -> list[Pool]:
    """Return the pools: one per tower with its own ratio, and one for all others; `totals` are what the towers cost."""
    own = [name for name in totals if name in ratios]
    shared = tuple(name for name in totals if name not in ratios)
    made = [_pool((name,), totals[name], ratios[name]) for name in own]
    if shared:
        total = sum(totals[name] for name in shared)
        if target is not None:
            made.append(Pool(shared, total, max(0, total - math.floor(target)), f"target {target:,.0f}"))
        else:
            made.append(_pool(shared, total, ratio))
    return [pool for pool in made if pool.remove > 0]


def times(groups: Iterable[Group]) -> dict[str, int]:
    """Return the nanoseconds that all units of each tower take."""
    total: dict[str, int] = {}
    for group in groups:
        total[group.tower] = total.get(group.tower, 0) + group.units * group.nanoseconds
    return total


def _pool(towers: tuple[str, ...], total: int, ratio: float) -> Pool:
    return Pool(towers, total, math.ceil(Fraction(str(ratio)) * total), f"ratio {ratio}")


def most_removable(pool: Pool, groups: Iterable[Group], bounds: Bounds, measure: str) -> int:
    """Return how much of the pool's parameters or MACs can go within the lower bounds."""
    mine = [group for group in groups if group.tower in pool.towers]
    layers = [bounds.layer(group, [0.0] * group.units, measure) for group in mine if group.kind != "blocks"]
    most = allocation.removable_cost(layers)
    # What a block's parts can give up goes with the block, once.
    parts: dict[tuple[str, int], int] = {}
    for group, layer in zip([group for group in mine if group.kind != "blocks"], layers, strict=True):
        place = (group.tower, group.block)
        parts[place] = parts.get(place, 0) + allocation.removable_cost([layer])
    for name in pool.towers:
        costs = sorted(
            g.price(measure) - parts.get((name, g.block), 0) for g in mine if g.kind == "blocks" and g.tower == name
        )
        most += sum(costs[len(costs) - min(len(costs), bounds.depths[name] - _staying(name, bounds)) :])
    return most


def require_possible(family: str, pool: Pool, groups: Sequence[Group], bounds: Bounds, measure: str) -> None:
    """Raise UsageError when the pool's units cannot pay for what has to go, naming what could."""
    most = most_removable(pool, groups, bounds, measure)
    if pool.remove > most:
        _refuse(family, pool, [group for group in groups if group.tower in pool.towers], most, measure)


def choose(
    family: str,
    pool: Pool,
    groups: Sequence[Group],
    values: Sequence[Tensor],
    bounds: Bounds,
    measure: str,
    allocator: Allocator | None = None,
) -> dict[Group, list[int]]:
    """Return the units each of the pool's groups keeps, shared out by `allocator`, else the knapsack.

    Where both blocks and parts of blocks may go, the blocks are chosen first; groups of blocks that go are kept whole here.
    Raises UsageError when the lower bounds leave too little.
    """
    priced = [
        (group, value.tolist()) for group, value in zip(groups, values, strict=True) if group.tower in pool.towers
    ]
    staying = _best_blocks(priced, bounds, measure)
    if len({group.kind == "blocks" for group, _ in priced}) == 2:
        gone = _blocks_to_go(pool, priced, staying, bounds, measure)
        rest = replace(pool, remove=pool.remove - sum(group.price(measure) for group in gone))
        parts = [(g, v) for g, v in zip(groups, values, strict=True) if g.kind != "blocks" and not _within(g, gone)]
        left = choose(family, rest, [g for g, _ in parts], [v for _, v in parts], bounds, measure, allocator)
        whole = {group: [] if group in gone else list(range(group.units)) for group, _ in priced}
        return whole | left
    free = [(group, value) for group, value in priced if group not in staying]
    layers = [bounds.layer(group, value, measure) for group, value in free]
    most = allocation.removable_cost(layers)
    if pool.remove > most:
        _refuse(family, pool, [group for group, _ in priced], most, measure)
    shared_out = allocator or knapsack
    kept = shared_out([group for group, _ in free], layers, pool.remove)
    chosen = {group: indices for (group, _), indices in zip(free, kept, strict=True)}
    return {group: chosen.get(group, [0]) for group, _ in priced}


def knapsack(groups: Sequence[Group], layers: Sequence[Layer], remove: int) -> list[list[int]]:
    """Return what `ops.allocation.allocate` keeps."""
    return allocation.allocate(layers, remove)


def even(groups: Sequence[Group], layers: Sequence[Layer], remove: int) -> list[list[int]]:
    """Return what `ops.allocation.allocate_evenly` keeps."""
    return allocation.allocate_evenly(layers, remove)


def worth(groups: Sequence[Group], scores: Sequence[Tensor], normalise: str, measure: str) -> list[Tensor]:
    """Return what each unit is worth, comparable over all groups: scores as they are, or relative to their layer.

    "layer" divides by the mean of the layer (for blocks: of the tower) and multiplies by the cost, "norm" divides by the layer's
    root mean square, "kind" standardises over all units of a kind; "cost" only multiplies by the cost, so that cheap and expensive
    units are as likely to go.
    """
    if normalise == "none":
        return list(scores)
    if normalise == "kind":
        scores = standardised(scores, [group.kind for group in groups])
    elif normalise != "cost":
        scores = _relative(groups, scores, importance.by_norm if normalise == "norm" else importance.relative)
    return [score.double() * group.price(measure) for group, score in zip(groups, scores, strict=True)]


def _relative(groups: Sequence[Group], scores: Sequence[Tensor], to_layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
    by_tower: dict[str, float] = {}
    for name in {group.tower for group in groups}:
        found = [float(s.mean()) for g, s in zip(groups, scores, strict=True) if g.kind == "blocks" and g.tower == name]
        by_tower[name] = sum(found) / len(found) if found else 0.0
    return [
        score / (by_tower[group.tower] or 1.0) if group.kind == "blocks" else to_layer(score)
        for group, score in zip(groups, scores, strict=True)
    ]


def _staying(name: str, bounds: Bounds) -> int:
    return share(bounds.min_keep, bounds.depths[name])


def _best_blocks(priced: Sequence[tuple[Group, list[float]]], bounds: Bounds, measure: str) -> set[Group]:
    """Return the blocks of each tower that may not go: as many of the densest as the lower bound asks for."""
    best: set[Group] = set()
    for name, depth in bounds.depths.items():
        blocks = [(value[0] / group.price(measure), -group.block, group) for group, value in priced
                  if group.kind == "blocks" and group.tower == name]  # fmt: skip
        untouched = depth - len(blocks)
        needed = max(0, _staying(name, bounds) - untouched)
        best.update(group for _, _, group in sorted(blocks, key=lambda item: item[:2], reverse=True)[:needed])
    return best


def _blocks_to_go(
    pool: Pool, priced: Sequence[tuple[Group, list[float]]], staying: set[Group], bounds: Bounds, measure: str
) -> set[Group]:
    """Return the blocks that go where parts of blocks may go too.

    All units go in order of value per cost until the budget holds, and a block takes with it what is left of it; then as many more
    blocks as it takes for the other parts to pay for the rest. A block that alone would overshoot stays.
    """
    blocks = [group for group, _ in priced if group.kind == "blocks" and group not in staying]
    units = [(value / group.price(measure), place, group)
             for place, (group, own) in enumerate(priced) if group not in staying for value in own]  # fmt: skip
    order = [group for _, _, group in sorted(units, key=lambda unit: unit[:2])]
    gone: set[Group] = set()
    removed = 0
    taken: dict[tuple[str, int], int] = {}
    for group in order:
        where, cost = (group.tower, group.block), group.price(measure)
        if removed >= pool.remove:
            break
        if group.kind == "blocks":
            if removed + cost - taken.get(where, 0) <= pool.remove:
                gone.add(group)
                removed += cost - taken.get(where, 0)
        elif not _within(group, gone):
            taken[where] = taken.get(where, 0) + cost
            removed += cost
    for group in order:
        if group in blocks and group not in gone and not _can_pay(pool, priced, gone, bounds, measure):
            gone.add(group)
    return gone


def _within(group: Group, blocks: set[Group]) -> bool:
    return any(block.tower == group.tower and block.block == group.block for block in blocks)


def _can_pay(
    pool: Pool, priced: Sequence[tuple[Group, list[float]]], gone: set[Group], bounds: Bounds, measure: str
) -> bool:
    parts = [bounds.layer(g, v, measure) for g, v in priced if g.kind != "blocks" and not _within(g, gone)]
    return pool.remove - sum(group.price(measure) for group in gone) <= allocation.removable_cost(parts)


def _refuse(family: str, pool: Pool, groups: Sequence[Group], most: int, measure: str) -> None:
    units = {(g.tower, g.kind): sum(h.units for h in groups if (h.tower, h.kind) == (g.tower, g.kind)) for g in groups}
    listed = ", ".join(f"{count:,} {tower} {kind}" for (tower, kind), count in units.items()) or "no units"
    largest = math.floor(most * 1000 / pool.total) / 1000
    needed = max((group.least for group in groups), default=1)
    bounds = "the lower bounds" + (f" (a token goes through {needed} experts of a block)" if needed > 1 else "")
    hint = f"use target >= {pool.total - most:,}" if pool.asked.startswith("target") else f"use ratio <= {largest:g}"
    raise UsageError(
        f"{family} has {listed}; {pool.asked} of {pool.total:,} {measure} would remove {pool.remove:,}, "
        f"and at most {most:,} can go within {bounds}",
        hint=f"{hint}, a smaller min_keep or multiple, more units, or protect fewer blocks",
    )
