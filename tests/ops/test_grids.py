"""Position tables resized as tensor arithmetic equal interpolation with antialiasing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from mmcompress.ops.grids import resize_grid


def test_halving_a_table_by_hand():
    # s = 4 / 2 = 2; for p = 0 the centre is 1, distances 0.5, 0.5, 1.5, 2.5 give weights 3/4, 3/4, 1/4, 0 of 7/4.
    table = torch.tensor([0.0, 7.0, 14.0, 21.0]).view(1, 4, 1).expand(4, 4, 1)
    made = resize_grid(table, torch.tensor([[1, 2]]), 2)[0, :, 0]
    torch.testing.assert_close(made, torch.tensor([(3 * 0 + 3 * 7 + 14) / 7, (7 + 3 * 14 + 3 * 21) / 7]))


def test_the_tables_own_size_changes_nothing():
    table = torch.randn(5, 5, 3)
    torch.testing.assert_close(resize_grid(table, torch.tensor([[5, 5]]), 25)[0], table.flatten(0, 1))


@pytest.mark.parametrize("shape", [(7, 7), (3, 12), (16, 2), (1, 30), (9, 3)])
def test_every_shape_equals_interpolation(shape):
    height, width = shape
    table = torch.randn(7, 7, 4)
    want = interpolate(table.permute(2, 0, 1)[None], size=shape, mode="bilinear", antialias=True, align_corners=False)
    made = resize_grid(table, torch.tensor([[7, 7], [height, width]]), 60)[1]
    torch.testing.assert_close(made[: height * width], want[0].flatten(1).T, atol=1e-5, rtol=0)
    assert (made[height * width :] == made[0]).all()


def test_one_column_is_one_row_turned():
    # torch 2.13 repeats the first value when it interpolates to one column; to one row it does not.
    table = torch.randn(7, 7, 4)
    column = resize_grid(table, torch.tensor([[31, 1]]), 31)
    torch.testing.assert_close(column, resize_grid(table.transpose(0, 1), torch.tensor([[1, 31]]), 31))


def test_half_precision_is_computed_in_float32():
    table = torch.randn(7, 7, 4)
    shapes = torch.tensor([[3, 9]])
    made = resize_grid(table.half(), shapes, 27)
    assert made.dtype == torch.float16
    torch.testing.assert_close(made.float(), resize_grid(table.half().float(), shapes, 27), atol=2e-3, rtol=0)
