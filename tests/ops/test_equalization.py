"""Equalized ranges of two Linears: by hand, and what is promised of the pair."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mmcompress.ops.equalization import equalizing_gains


def test_gains_by_hand() -> None:
    """Ranges 4 and 1: s = sqrt(4 * 1) / 1 = 2, the row halved and the column doubled, both 2. Ranges 1 and 9: both 3."""
    made, read = torch.tensor([4.0, 1.0, 5.0]), torch.tensor([1.0, 9.0, 5.0])
    assert equalizing_gains(made, read).tolist() == [0.5, 3, 1]


def test_channels_of_zeros_stay_as_they_are() -> None:
    assert equalizing_gains(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])).tolist() == [1, 1, 1]


def test_ranges_far_apart_leave_no_infinity() -> None:
    made, read = torch.tensor([1e-30, 1e30]), torch.tensor([1e30, 1e-30])
    assert equalizing_gains(made, read).tolist() == pytest.approx([1e30, 1e-30], rel=1e-5)


def test_the_product_stays_and_ranges_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 7), (5, 12)))
    first *= torch.logspace(-2, 2, 12, dtype=torch.float64)[:, None]
    bias, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12,), (9, 7)))
    gain = equalizing_gains(first.abs().amax(1), second.abs().amax(0)).double()
    rows, columns = first * gain[:, None], second / gain
    torch.testing.assert_close(rows.abs().amax(1), columns.abs().amax(0), rtol=1e-6, atol=0)
    for between in (torch.nn.Identity(), functional.relu):
        wanted = between(x @ first.T + bias) @ second.T
        torch.testing.assert_close(between(x @ rows.T + bias * gain) @ columns.T, wanted)
