"""Hadamard matrices by both of Paley's constructions and by doubling; and rotations made of them."""

import pytest
import torch

from mmcompress.ops.hadamard import hadamard, hadamard_rotation


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 28, 36, 60, 64, 72, 80, 384, 576, 768])
def test_rows_of_ones_are_orthogonal(order: int) -> None:
    made = hadamard(order)
    assert made is not None
    assert torch.equal(made.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(made @ made.T, order * torch.eye(order, dtype=torch.float64))


def test_order_4_by_hand() -> None:
    """Paley's first construction of 3, whose only square is 1: Q = (0 - +; + 0 -; - + 0)."""
    wanted = [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]
    assert torch.equal(hadamard(4), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 52, 92, 127])
def test_where_none_is_known_the_rotation_is_drawn(order: int) -> None:
    assert hadamard(order) is None
    turn = hadamard_rotation(order, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.T, torch.eye(order, dtype=torch.float64))


def test_a_rotation_spreads_one_channel_over_all() -> None:
    turn = hadamard_rotation(384, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.T, torch.eye(384, dtype=torch.float64))
    one = torch.zeros(384, dtype=torch.float64)
    one[7] = 5
    torch.testing.assert_close((one @ turn).abs(), torch.full((384,), 5 / 384**0.5, dtype=torch.float64))
    other = hadamard_rotation(384, torch.Generator().manual_seed(1))
    assert not torch.equal(turn, other)
    signs = (turn * other).sign()[:, :1]
    assert 150 < (signs > 0).sum() < 234  # and not of all rows together
