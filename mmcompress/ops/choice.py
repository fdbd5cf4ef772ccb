"""One option for each of several groups, so that the losses add up to the least within a budget: a multiple-choice knapsack.

    minimise  sum_gk loss_gk x_gk     such that  sum_gk cost_gk x_gk <= budget,  sum_k x_gk = 1 for each group g,  x binary

Sinha and Zoltners, "The multiple-choice knapsack problem" (1979); for bits of layers: Yao et al., HAWQ-V3 (2011.10680), 3.4.
Solved exactly by HiGHS, an integer programming solver (Huangfu and Hall, 2018). Options that another one of their group beats in
both loss and cost are left out before. Deliberate differences: losses are scaled, so that the solver's absolute tolerances lie far
below them, and costs that are whole numbers stay so: what it returns is added up again exactly.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from mmcompress.errors import MissingError

LARGEST_LOSS = 1e6
"""What the largest loss becomes: HiGHS tells objectives apart down to about 1e-7."""
TIGHT = 1e-9


@dataclass(frozen=True)
class Option:
    """What a group may become."""

    loss: float
    cost: int | float


Groups = Sequence[Sequence[Option]]


def require_solver() -> None:
    """Raise MissingError without highspy."""
    if importlib.util.find_spec("highspy") is None:
        raise MissingError("choosing a scheme for each layer needs highspy", hint="pip install 'mmcompress[mixed]'")


def cost_of(groups: Groups, chosen: Sequence[int]) -> Fraction:
    """Return what a choice costs, added up exactly."""
    return sum((Fraction(options[index].cost) for options, index in zip(groups, chosen, strict=True)), Fraction(0))


def loss_of(groups: Groups, chosen: Sequence[int]) -> float:
    """Return the sum of the losses of a choice."""
    return math.fsum(options[index].loss for options, index in zip(groups, chosen, strict=True))


def cheapest(groups: Groups) -> list[int]:
    """Return the choice that costs least, of several the one that loses least."""
    return [min(range(len(options)), key=lambda k: (options[k].cost, options[k].loss)) for options in groups]


def best_choice(groups: Groups, budget: int | float) -> list[int] | None:
    """Return the index of each group's option, None where even the cheapest ones cost more than `budget`.

    Raises MissingError without highspy.
    """
    least = cheapest(groups)
    if cost_of(groups, least) > budget:
        return None
    left = [worth_having(options) for options in groups]
    if all(len(indices) == 1 for indices in left):
        return least
    found = _solved([[options[k] for k in indices] for options, indices in zip(groups, left, strict=True)], budget)
    chosen = [indices[k] for indices, k in zip(left, found, strict=True)]
    assert cost_of(groups, chosen) <= Fraction(budget) * (1 + Fraction(TIGHT)), "the solver went beyond the budget"
    return chosen


def random_choice(groups: Groups, budget: int | float, seed: int) -> list[int] | None:
    """Return a random choice that spends the budget, None where even the cheapest options cost more.

    From the cheapest on, groups are drawn that take their next dearer option, while it fits.
    """
    chosen = cheapest(groups)
    left = Fraction(budget) - cost_of(groups, chosen)
    if left < 0:
        return None
    drawn = random.Random(seed)
    while True:
        steps = {
            group: k for group in range(len(groups)) if (k := _next_dearer(groups[group], chosen[group])) is not None
        }
        prices = {
            group: Fraction(groups[group][k].cost) - Fraction(groups[group][chosen[group]].cost)
            for group, k in steps.items()
        }
        fitting = [group for group, price in prices.items() if price <= left]
        if not fitting:
            return chosen
        group = drawn.choice(fitting)
        left -= prices[group]
        chosen[group] = steps[group]


def _next_dearer(options: Sequence[Option], now: int) -> int | None:
    dearer = [k for k, option in enumerate(options) if option.cost > options[now].cost]
    return min(dearer, key=lambda k: (options[k].cost, k), default=None)


def worth_having(options: Sequence[Option]) -> list[int]:
    """Return the indices of the options that no other beats in both cost and loss, the cheapest first."""
    kept: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: (options[k].cost, options[k].loss)):
        if not kept or options[k].loss < options[kept[-1]].loss:
            kept.append(k)
    return kept


def _solved(groups: Groups, budget: int | float) -> list[int]:
    require_solver()
    import highspy
    import numpy as np

    losses = np.array([option.loss for options in groups for option in options], dtype=np.float64)
    costs = np.array([option.cost for options in groups for option in options], dtype=np.float64)
    # A loss of 0 for all, or a budget of 0, needs no scaling.
    losses *= LARGEST_LOSS / (np.abs(losses).max() or 1.0)
    costs, limit = costs / (float(budget) or 1.0), 1.0 if budget else 0.0
    starts = np.cumsum([0, *(len(options) for options in groups)])
    count, places = len(losses), np.arange(len(losses), dtype=np.int32)

    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = count, len(groups) + 1
    model.col_cost_, model.col_lower_, model.col_upper_ = losses, np.zeros(count), np.ones(count)
    model.integrality_ = [highspy.HighsVarType.kInteger] * count
    model.row_lower_ = np.array([*[1.0] * len(groups), -highspy.kHighsInf])
    model.row_upper_ = np.array([*[1.0] * len(groups), limit])
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.array([*starts, 2 * count], dtype=np.int32)
    model.a_matrix_.index_ = np.concatenate([places, places])
    model.a_matrix_.value_ = np.concatenate([np.ones(count), costs])

    # Without what Python adds to it, which prints two lines on stdout as it is made (1.16).
    bare: Any = highspy.Highs.__base__
    solver = bare()
    # One thread: the same instance has the same solution everywhere.
    settings = {"output_flag": False, "threads": 1, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0,
                "mip_feasibility_tolerance": TIGHT, "primal_feasibility_tolerance": TIGHT}  # fmt: skip
    for name, value in settings.items():
        solver.setOptionValue(name, value)
    solver.passModel(model)
    solver.run()
    status = solver.getModelStatus()
    assert status == highspy.HighsModelStatus.kOptimal, f"HiGHS ended with {solver.modelStatusToString(status)}"
    values = np.array(solver.getSolution().col_value)
    return [int(values[start:stop].argmax()) for start, stop in pairwise(starts)]
