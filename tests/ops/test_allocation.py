import itertools
import random

import pytest

from mmcompress.ops.allocation import Chunk, Layer, allocate, allocate_evenly, removable_cost, spend


def test_equal_costs_are_a_global_sort() -> None:
    layers = [Layer((5, 1, 4), cost=10, bound=1), Layer((2, 3, 9), cost=10, bound=1)]
    assert allocate(layers, 0) == [[0, 1, 2], [0, 1, 2]]
    assert allocate(layers, 10) == [[0, 2], [0, 1, 2]]
    assert allocate(layers, 21) == [[0, 2], [2]]
    assert allocate(layers, 40) == [[0], [2]]


def test_evenly_the_same_share_goes_everywhere_whatever_the_values_and_costs() -> None:
    layers = [Layer((1, 2, 3, 4), cost=1, bound=0), Layer((900, 700, 800, 600), cost=50, bound=0)]
    assert allocate_evenly(layers, 102) == [[2, 3], [0, 2]]
    assert allocate(layers, 104) == [[], [0, 2]]
    # Half of eight and of sixteen, in steps of eight for one of them.
    wide = [Layer(tuple(range(16)), cost=2, bound=0, multiple=8), Layer(tuple(range(8)), cost=3, bound=0)]
    assert [len(kept) for kept in allocate_evenly(wide, 28)] == [8, 4]


def test_evenly_is_within_the_bounds_and_a_unit_of_the_budget() -> None:
    rng = random.Random(2)
    layers = [Layer(tuple(rng.random() for _ in range(9)), cost, bound) for cost, bound in ((3, 1), (7, 4), (2, 2))]
    for remove in range(1, removable_cost(layers) + 1):
        kept = allocate_evenly(layers, remove)
        cost, _ = _lost(layers, kept)
        assert remove <= cost < remove + 7
        assert all(len(units) >= layer.bound for units, layer in zip(kept, layers, strict=True))
    with pytest.raises(ValueError, match="to remove"):
        allocate_evenly(layers, removable_cost(layers) + 1)


def test_value_per_cost_decides() -> None:
    # Worth 6 for 10 (0.6 each) goes before worth 2 for 2 (1 each).
    layers = [Layer((6, 60), cost=10, bound=1), Layer((2, 2, 20), cost=2, bound=1)]
    assert allocate(layers, 10) == [[1], [0, 1, 2]]


def test_overshoot_is_put_back() -> None:
    # The cheap units go first and then the dear one covers the rest alone, so both cheap ones may return.
    layers = [Layer((1, 1, 90), cost=2, bound=1), Layer((10, 90), cost=10, bound=1)]
    assert allocate(layers, 5) == [[0, 1, 2], [1]]


def test_bounds_and_multiples() -> None:
    layer = Layer(tuple(range(21)), cost=1, bound=3, multiple=8)
    assert removable_cost([layer]) == 13
    # 21 is no multiple: the first chunk is 5 wide, the next 8.
    assert allocate([layer], 1) == [list(range(5, 21))]
    assert allocate([layer], 6) == [list(range(13, 21))]
    with pytest.raises(ValueError, match="14 to remove, 13 removable"):
        allocate([layer], 14)
    assert removable_cost([Layer((1, 1, 1), cost=1, bound=1, multiple=8)]) == 0


def test_tied_layers_keep_equal_numbers_but_their_own_units() -> None:
    layers = [Layer((1, 2, 9), 1, 1, tie="a"), Layer((9, 1, 2), 1, 1, tie="a"), Layer((5, 5), 1, 1)]
    assert allocate(layers, 2) == [[1, 2], [0, 2], [0, 1]]
    with pytest.raises(ValueError, match="differ in width"):
        allocate([layers[0], Layer((1, 2), 1, 1, tie="a")], 1)


def test_ties_go_to_the_first() -> None:
    assert allocate([Layer((1, 1), 1, 0), Layer((1, 1), 1, 0)], 3) == [[], [1]]


def _lost(layers: list[Layer], kept: list[list[int]]) -> tuple[int, float]:
    gone = [set(range(len(layer.values))) - set(stay) for layer, stay in zip(layers, kept, strict=True)]
    cost = sum(layer.cost * len(units) for layer, units in zip(layers, gone, strict=True))
    return cost, sum(layer.values[unit] for layer, units in zip(layers, gone, strict=True) for unit in units)


def _optimum(layers: list[Layer], remove: int) -> float:
    choices = [
        [
            units
            for n in range(len(layer.values) - layer.bound + 1)
            for units in itertools.combinations(range(len(layer.values)), n)
        ]
        for layer in layers
    ]
    worths = []
    for picked in itertools.product(*choices):
        cost = sum(layer.cost * len(units) for layer, units in zip(layers, picked, strict=True))
        if cost >= remove:
            worths.append(sum(layer.values[u] for layer, units in zip(layers, picked, strict=True) for u in units))
    return min(worths)


@pytest.mark.parametrize("seed", range(12))
def test_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    layers = [Layer(tuple(rng.random() for _ in range(4)), rng.choice((2, 3, 7)), rng.choice((0, 1))) for _ in range(3)]
    for remove in range(1, removable_cost(layers) + 1):
        cost, value = _lost(layers, allocate(layers, remove))
        assert remove <= cost < remove + max(layer.cost for layer in layers)
        dearest = max(value for layer in layers for value in layer.values)
        assert value < _optimum(layers, remove) + dearest


def test_removing_more_never_costs_more_by_a_unit() -> None:
    rng = random.Random(1)
    layers = [Layer(tuple(rng.random() for _ in range(30)), cost, 2) for cost in (3, 3, 40, 11)]
    costs = [_lost(layers, allocate(layers, remove))[0] for remove in range(0, removable_cost(layers), 40)]
    assert costs == sorted(costs)


def test_a_dear_first_step_goes_with_those_that_make_it_worth_while() -> None:
    # 9 for 1, then 1 for 9: together 1 each, less than the 2 each of the other queue; alone the first would go last.
    rising = [Chunk(9, 1, 1), Chunk(1, 9, 1)]
    assert spend([rising, [Chunk(20, 10, 1)]], 10) == [2, 0]
    # 30 are gone where 21 were wanted. The first queue's last step alone is worth least; with the one before, most: 10 for 7.
    assert spend([[Chunk(9, 3, 1), Chunk(1, 4, 1)], [Chunk(1.5, 3, 1)], [Chunk(100, 20, 1)]], 21) == [0, 1, 1]


def _cheapest(queues: list[list[Chunk]], remove: int) -> float:
    totals = []
    for counts in itertools.product(*(range(len(queue) + 1) for queue in queues)):
        gone = [chunk for queue, count in zip(queues, counts, strict=True) for chunk in queue[:count]]
        if sum(chunk.cost for chunk in gone) >= remove:
            totals.append(sum(chunk.value for chunk in gone))
    return min(totals)


@pytest.mark.parametrize("seed", range(8))
def test_queues_of_any_shape_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    queues = [[Chunk(rng.random(), rng.choice((1, 3, 4)), 1) for _ in range(4)] for _ in range(3)]
    for remove in range(1, sum(chunk.cost for queue in queues for chunk in queue) + 1):
        counts = spend(queues, remove)
        gone = [queue[:count] for queue, count in zip(queues, counts, strict=True)]
        slack = sum(chunk.cost for part in gone for chunk in part) - remove
        assert 0 <= slack < min(part[-1].cost for part in gone if part)
        value = sum(chunk.value for part in gone for chunk in part)
        largest = max(sum(chunk.value for chunk in queue) for queue in queues)
        assert value < _cheapest(queues, remove) + largest
