"""Budgets by hand: what units are worth, what has to stay, and who pays."""

from __future__ import annotations

import pytest
import torch

from mmcompress.errors import UsageError
from mmcompress.passes.prune_budget import Bounds, Pool, choose, most_removable, require_possible, worth
from mmcompress.passes.prune_units import Costs, Group, Kind

BOUNDS = Bounds(0.1, 1, False, {"vision": 4})


def group(block: int, units: int, cost: int, kind: Kind = "neurons", tower: str = "vision") -> Group:
    return Group(tower, block, kind, units, Costs(cost, 10 * cost))


def test_worth_by_hand() -> None:
    groups = [group(0, 2, 1), group(1, 2, 5)]
    scores = [torch.tensor([1.0, 3.0]), torch.tensor([10.0, 30.0])]
    expected = {"none": [[1, 3], [10, 30]], "layer": [[0.5, 1.5], [2.5, 7.5]], "cost": [[1, 3], [50, 150]]}
    for normalise, want in expected.items():
        assert [value.tolist() for value in worth(groups, scores, normalise, "parameters")] == want
    assert worth(groups, scores, "layer", "macs")[1].tolist() == [25, 75]
    # The root mean square of (1, 3) is the root of 5.
    norms = [value.tolist() for value in worth(groups, scores, "norm", "parameters")]
    assert norms == [pytest.approx([5**-0.5, 3 * 5**-0.5]), pytest.approx([5 * 5**-0.5, 15 * 5**-0.5])]


def test_blocks_are_relative_to_their_tower() -> None:
    groups = [group(0, 1, 2, "blocks"), group(1, 1, 2, "blocks"), group(0, 1, 4, "blocks", "text")]
    scores = [torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([0.5])]
    assert [float(value) for value in worth(groups, scores, "layer", "parameters")] == [1, 3, 4]


def test_relative_to_the_layer_equal_shares_go_however_scores_and_costs_differ() -> None:
    """The same relative scores in every layer: each gives up the same share, be its units cheap or expensive."""
    groups = [group(0, 4, 1), group(1, 4, 7)]
    scores = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([100.0, 200, 300, 400])]
    values = worth(groups, scores, "layer", "parameters")
    chosen = choose("x", Pool(("vision",), 32, 16, "ratio 0.5"), groups, values, BOUNDS, "parameters")
    assert list(chosen.values()) == [[2, 3], [2, 3]]


def test_the_best_blocks_stay_however_much_has_to_go() -> None:
    groups = [group(index, 1, 10, "blocks") for index in range(4)]
    values = [torch.tensor([float(value)]) for value in (3, 1, 4, 2)]
    bounds = Bounds(0.5, 1, False, {"vision": 4})
    chosen = choose("x", Pool(("vision",), 100, 20, "ratio 0.2"), groups, values, bounds, "parameters")
    assert list(chosen.values()) == [[0], [], [0], []]
    too_much = Pool(("vision",), 100, 21, "ratio 0.21")
    with pytest.raises(UsageError, match="at most 20 can go within the lower bounds"):
        require_possible("x", too_much, groups, bounds, "parameters")
    with pytest.raises(UsageError, match="at most 20 can go within the lower bounds"):
        choose("x", too_much, groups, values, bounds, "parameters")


def test_protected_blocks_count_among_those_that_stay() -> None:
    groups = [group(index, 1, 10, "blocks") for index in (1, 2)]
    values = [torch.tensor([1.0]), torch.tensor([2.0])]
    bounds = Bounds(0.5, 1, False, {"vision": 4})
    chosen = choose("x", Pool(("vision",), 100, 20, "ratio 0.2"), groups, values, bounds, "parameters")
    assert list(chosen.values()) == [[], []]


def both(values: list[float], remove: int, min_keep: float = 0.1) -> list[list[int]]:
    """Return what stays of two blocks of 20 with 10 neurons of 1 each, by values per cost: (block, its neurons) twice."""
    groups = [group(0, 1, 20, "blocks"), group(0, 10, 1), group(1, 1, 20, "blocks"), group(1, 10, 1)]
    made = [torch.tensor([value * 20]) if g.kind == "blocks" else value + torch.arange(10) / 1000
            for g, value in zip(groups, values, strict=True)]  # fmt: skip
    pool, bounds = Pool(("vision",), 100, remove, f"ratio {remove / 100}"), Bounds(min_keep, 1, False, {"vision": 4})
    require_possible("x", pool, groups, bounds, "parameters")
    return list(choose("x", pool, groups, made, bounds, "parameters").values())


def test_a_block_takes_its_parts_with_it() -> None:
    # The first block's neurons would be next, but are gone with it: the other's pay for the rest.
    assert both([1, 2, 9, 3], remove=24) == [[], list(range(10)), [0], list(range(4, 10))]


def test_a_block_that_would_overshoot_stays_while_parts_can_pay() -> None:
    assert both([1, 2, 9, 3], remove=12) == [[0], [9], [0], list(range(3, 10))]
    # 9 + 9 neurons may go at most, so for 19 a block has to.
    assert both([4, 2, 9, 3], remove=18) == [[0], [9], [0], [9]]
    assert both([4, 2, 9, 3], remove=19) == [[], list(range(10)), [0], list(range(10))]


def test_what_can_go_counts_parts_of_blocks_that_go_once() -> None:
    # Of four blocks two must stay, two of which may not go anyway.
    groups = [group(0, 1, 20, "blocks"), group(0, 10, 1), group(1, 1, 20, "blocks"), group(1, 10, 1)]
    for min_keep, most in ((0.5, 40), (0.75, 20 + 2), (1.0, 0)):
        bounds = Bounds(min_keep, 1, False, {"vision": 4})
        assert most_removable(Pool(("vision",), 100, 1, ""), groups, bounds, "parameters") == most
