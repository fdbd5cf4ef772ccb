from __future__ import annotations

import pytest
import torch

from mmcompress.ops.outliers import above_fence, available, outlier_factors, outliers, sufficient


def test_the_fence_by_hand() -> None:
    # Quartiles of 0 … 8 are 2 and 6, so the fence is 6 + 1.5 * 4 = 12; interpolated for 1, 2, 3, 10: 1.75 and 4.75, so 9.25;
    assert above_fence(torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7, 8]])).tolist() == [0]
    # for 1, 2, 3, 8: 1.75 and 4.25, so 8, and at the fence is not above it.
    assert above_fence(torch.tensor([[1.0, 2, 3, 10], [1.0, 2, 3, 8], [5.0, 5, 5, 5]])).tolist() == [1, 0, 0]
    # Quartiles that are equal make the fence their value.
    assert above_fence(torch.tensor([[1.0, 1, 1, 1, 1 + 2**-20]])).tolist() == [1]


def test_half_precision_counts_as_its_values_in_full() -> None:
    scores = torch.linspace(0, 1, 50).square().half()
    assert above_fence(scores[None]).equal(above_fence(scores.double()[None]))
    assert outlier_factors(scores).equal(outlier_factors(scores.double()))


def test_outliers_golden() -> None:
    """Recoverable Compression's: 98 background scores and two that are looked at."""
    scores = torch.tensor([0.01] * 98 + [0.5, 0.6])
    assert outliers(scores) == 2
    assert (outlier_factors(scores) > 1.5).nonzero().flatten().tolist() == [98, 99]


def test_factors_by_hand() -> None:
    """0, 1, 2, 10 with three neighbours each, which are all others.

    Distances to the farthest: 10, 9, 8, 10. Mean reach distances (a to b: the larger of their distance and b's own reach):
    0: (9 + 8 + 10) / 3 = 9; 1: (10 + 8 + 10) / 3; 2: (10 + 9 + 10) / 3; 10: (10 + 9 + 8) / 3 = 9.
    """
    density = [1 / 9, 3 / 28, 3 / 29, 1 / 9]
    expected = [(sum(density) - own) / 3 / own for own in density]
    torch.testing.assert_close(
        outlier_factors(torch.tensor([0.0, 1, 2, 10])), torch.tensor(expected, dtype=torch.float64)
    )


def test_the_order_of_scores_does_not_matter_and_low_ones_count() -> None:
    scores = torch.cat([torch.linspace(0.4, 0.6, 60), torch.tensor([0.0, 1.0])])
    shuffled = torch.randperm(62, generator=torch.Generator().manual_seed(0))
    assert outliers(scores) == 2
    assert outlier_factors(scores)[shuffled].equal(outlier_factors(scores[shuffled]))


@pytest.mark.parametrize("count", [0, 1, 2, 11, 40])
def test_scores_that_are_all_the_same_have_no_outlier(count: int) -> None:
    assert outliers(torch.full((count,), 0.25)) == 0
    assert torch.equal(outlier_factors(torch.full((count,), 0.25)), torch.ones(count, dtype=torch.float64))


def test_what_suffices_for_almost_all_by_hand() -> None:
    assert sufficient(range(1, 101)) == 95
    assert sufficient(range(1, 20)) == 19  # 18 of 19 are 94.7 in a hundred
    assert sufficient(range(1, 21)) == 19
    assert sufficient([4]) == 4
    assert available(range(1, 101)) == 6  # five have fewer
    assert available(range(1, 20)) == 1
    assert available(range(1, 21)) == 2
    assert available([4]) == 4
