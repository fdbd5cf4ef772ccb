"""The multiple-choice knapsack: by hand, against trying everything, and what its random counterpart spends."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
import time

import pytest

from mmcompress.errors import MissingError
from mmcompress.ops.choice import (
    Option,
    best_choice,
    cheapest,
    cost_of,
    loss_of,
    random_choice,
    worth_having,
)

# Three groups of 10 weights: 4, 8 or 32 bits. With 8 bits on average one group, the most sensitive, could have 16 if there were 16.
BY_HAND = [
    [Option(0.09, 40), Option(0.010, 80), Option(0.0, 320)],
    [Option(0.05, 40), Option(0.002, 80), Option(0.0, 320)],
    [Option(0.01, 40), Option(0.001, 80), Option(0.0, 320)],
]


@pytest.mark.parametrize(
    ("budget", "chosen", "loss"),
    [
        (119, None, None),  # three times 40 is 120
        (120, [0, 0, 0], 0.15),
        (160, [1, 0, 0], 0.07),  # what 40 more buys: 0.08, 0.048 or 0.009
        (200, [1, 1, 0], 0.022),
        (240, [1, 1, 1], 0.013),
        (439, [1, 1, 1], 0.013),
        (440, [2, 1, 0], 0.012),  # 320 + 80 + 40: the last group pays for the first
        (479, [2, 1, 0], 0.012),
        (480, [2, 1, 1], 0.003),
        (959, [2, 2, 1], 0.001),
        (960, [2, 2, 2], 0.0),
    ],
)
def test_choices_by_hand(budget: int, chosen: list[int] | None, loss: float | None) -> None:
    found = best_choice(BY_HAND, budget)
    assert found == chosen
    if found is not None:
        assert loss_of(BY_HAND, found) == pytest.approx(loss, abs=1e-12)


def test_greedy_by_worth_per_cost_is_not_enough() -> None:
    # The first upgrade gives most per byte (0.6 / 6) and leaves no room for the two others, which together give more (0.9).
    groups = [[Option(0.6, 0), Option(0.0, 6)], [Option(0.45, 0), Option(0.0, 5)], [Option(0.45, 0), Option(0.0, 5)]]
    assert best_choice(groups, 10) == [0, 1, 1]


def drawn(seed: int) -> tuple[list[list[Option]], int]:
    """Up to six groups of up to four options; losses over seven powers of ten, costs that are megabytes, as of real layers."""
    rng = random.Random(seed)
    groups = [
        [
            Option(10 ** rng.uniform(-7, 0), rng.randint(1, 40) * rng.choice((4, 1_048_576)))
            for _ in range(rng.randint(1, 4))
        ]
        for _ in range(rng.randint(1, 6))
    ]
    least = int(cost_of(groups, cheapest(groups)))
    most = sum(max(int(option.cost) for option in options) for options in groups)
    return groups, rng.randint(least, most)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all(seed: int) -> None:
    groups, budget = drawn(seed)
    allowed = [
        chosen
        for chosen in itertools.product(*(range(len(options)) for options in groups))
        if cost_of(groups, chosen) <= budget
    ]
    found = best_choice(groups, budget)
    assert found is not None
    assert cost_of(groups, found) <= budget
    assert loss_of(groups, found) == pytest.approx(min(loss_of(groups, chosen) for chosen in allowed), rel=1e-9)


def least_loss(groups: list[list[Option]], budget: int) -> float:
    """By a table over every cost up to the budget (dynamic programming)."""
    table = [0.0] + [math.inf] * budget
    for options in groups:
        reached = [math.inf] * (budget + 1)
        for option in options:
            for spent in range(int(option.cost), budget + 1):
                reached[spent] = min(reached[spent], table[spent - int(option.cost)] + option.loss)
        table = reached
    return min(table)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_it_is_the_best_of_many_groups_however_small_losses_are(seed: int, size: float) -> None:
    rng = random.Random(100 + seed)
    groups = [
        [Option(size * rng.uniform(1, 2) * (3 - k), 7 * k + rng.randint(1, 9)) for k in range(3)] for _ in range(25)
    ]
    budget = rng.randint(250, 400)
    found = best_choice(groups, budget)
    assert found is not None
    assert loss_of(groups, found) == pytest.approx(least_loss(groups, budget), rel=1e-9)


def test_costs_may_be_fractions() -> None:
    groups = [[Option(0.2, 0.1), Option(0.0, 0.3)], [Option(0.1, 0.1), Option(0.0, 0.3)]]
    assert best_choice(groups, 0.4) == [1, 0]
    assert best_choice(groups, 0.19) is None


def test_a_model_of_hundreds_of_groups_takes_no_time() -> None:
    rng = random.Random(0)
    groups = [
        [Option(10 ** rng.uniform(-5, -2) * k**2, (8 - k) * size) for k in (4, 1, 0)]
        for size in rng.choices((589_824, 2_359_296, 786_432, 147_456), k=400)
    ]
    started = time.monotonic()
    found = best_choice(groups, int(sum(5 * int(options[2].cost) // 8 for options in groups)))
    assert found is not None
    assert {*found} == {0, 1, 2}
    assert time.monotonic() - started < 20


def test_the_solver_prints_nothing() -> None:
    groups = "[[Option(0.3, 4), Option(0.1, 8)], [Option(0.2, 4), Option(0.1, 8)]]"
    script = f"from mmcompress.ops.choice import Option, best_choice; print(best_choice({groups}, 12))"
    # Only the first solver of a process has something to say.
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("[1, 0]\n", "")


def test_options_that_another_beats_are_left_out() -> None:
    options = [Option(0.2, 8), Option(0.1, 8), Option(0.3, 4), Option(0.3, 6), Option(0.1, 9)]
    assert worth_having(options) == [2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_a_random_choice_spends_what_it_may(seed: int) -> None:
    groups, budget = drawn(seed)
    found = random_choice(groups, budget, seed)
    assert found is not None
    spent = cost_of(groups, found)
    assert spent <= budget
    left = budget - spent
    for options, index in zip(groups, found, strict=True):
        assert not any(0 < option.cost - options[index].cost <= left for option in options)
    assert found == random_choice(groups, budget, seed)


def test_random_choices_differ_by_seed_and_know_no_losses() -> None:
    found = {tuple(random_choice(BY_HAND, 200, seed) or ()) for seed in range(30)}
    assert found == {(1, 1, 0), (1, 0, 1), (0, 1, 1)}
    assert random_choice(BY_HAND, 119, 0) is None


def test_without_the_solver_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "highspy" else real(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "highspy", raising=False)
    with pytest.raises(MissingError, match="needs highspy") as caught:
        best_choice(BY_HAND, 200)
    assert caught.value.exit_code == 4
    assert caught.value.hint == "pip install 'mmcompress[mixed]'"
    # Where nothing is to be chosen, nothing is needed.
    assert best_choice([[Option(0.1, 4)]], 4) == [0]
