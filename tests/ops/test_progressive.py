"""UPop's schedule and standardised scores, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmcompress.ops.progressive import progress, standardised


@pytest.mark.parametrize(
    ("share", "reached"), [(0.1, 0.0782), (0.25, 0.1913), (0.5, 0.3536), (0.75, 0.4619), (1.0, 0.5)]
)
def test_the_schedule_of_the_paper(share: float, reached: float) -> None:
    steps = 1000
    step = round(share * steps) - 1
    assert 0.5 * progress(step, steps) == pytest.approx(reached, abs=5e-5)
    assert progress(step, steps) == pytest.approx(math.sqrt((1 - math.cos(math.pi * (step + 1) / steps)) / 2))


def test_the_last_step_reaches_all_of_it_exactly() -> None:
    assert all(progress(steps - 1, steps) == 1.0 for steps in range(1, 300))


def test_scores_are_standardised_within_their_kind() -> None:
    scores = [torch.tensor([1.0, 3.0]), torch.tensor([100.0, 200.0, 300.0]), torch.tensor([5.0])]
    heads, neurons, more = standardised(scores, ["heads", "neurons", "heads"])
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / 3
    unit = 2 / math.sqrt(8 / 3)
    assert torch.cat([heads, more]).tolist() == pytest.approx([-unit, 0.0, unit])
    assert neurons.tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])


def test_equal_scores_are_all_zero() -> None:
    assert standardised([torch.full((3,), 7.0)], ["heads"])[0].tolist() == [0.0, 0.0, 0.0]
