"""AWQ's scales and their search, clipped ranges, and how much tokens count: golden values by hand, and what is promised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmcompress.ops.awq import STRENGTHS, best_strength, channel_scales
from mmcompress.ops.balance import floored_ratios, token_weights
from mmcompress.ops.clipping import SHARES, clipped_grid
from mmcompress.ops.gptq import output_error
from mmcompress.ops.grouped import nearest, nearest_grid, on_grid
from mmcompress.ops.rounding import Levels, scale_from_range
from mmcompress.surgery.watch import Sums

TWO_BITS = Levels(0, 3, torch.uint8, symmetric=False)


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made[:, ::17] *= 6
    return made


def inputs(columns: int = 64, tokens: int = 400, seed: int = 1) -> Tensor:
    """Channels that have to do with each other, of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / 4 + torch.eye(columns)
    return (torch.randn(tokens, columns, generator=generator) @ mixing) * torch.logspace(-1, 1, columns)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def test_scales_by_hand() -> None:
    """(16, 1) to the power 1/2 is (4, 1); divided by sqrt(4 * 1) that is (2, 1/2)."""
    torch.testing.assert_close(channel_scales(torch.tensor([16.0, 1.0]), 0.5), torch.tensor([2.0, 0.5]))
    assert channel_scales(torch.tensor([16.0, 1.0]), 0.0).tolist() == [1, 1]


def test_channels_that_calibration_did_not_meet_are_not_blown_up() -> None:
    scales = channel_scales(torch.tensor([0.0, 1e-9, 1.0]), 0.5)
    # Four orders of magnitude at most, and half of them with the power 1/2.
    torch.testing.assert_close(scales, torch.tensor([0.1, 0.1, 10.0]))
    assert channel_scales(torch.zeros(3), 0.95).tolist() == [1, 1, 1]


def test_the_search_by_hand() -> None:
    """With whole numbers as grid, 1.5 and 4 lie on it together only once scaled by 4^a and 4^-a with a = 1/2: as 3 and 2."""
    found = best_strength(
        [torch.tensor([[1.5, 4.0]])], torch.tensor([16.0, 1.0]), torch.diag(torch.tensor([256.0, 1.0])), torch.round
    )
    assert found == 0.5


def test_the_search_is_over_the_sum_of_all_weights_of_one_input() -> None:
    """Written out for two channels: every strength, every number rounded by itself."""
    rows, sizes, squares = [(0.4, 1.3), (0.9, 2.2)], (9.0, 1.0), (90.0, 2.0)

    def error(strength: float) -> float:
        largest = 9**strength
        scales = (largest / math.sqrt(largest), 1 / math.sqrt(largest))
        return sum(
            square * (w - round(w * s) / s) ** 2
            for row in rows
            for w, s, square in zip(row, scales, squares, strict=True)
        )

    wanted = min(STRENGTHS, key=error)
    parts = [torch.tensor([row]) for row in rows]
    assert best_strength(parts, torch.tensor(sizes), torch.diag(torch.tensor(squares)), torch.round) == wanted
    alone = [
        best_strength([part], torch.tensor(sizes), torch.diag(torch.tensor(squares)), torch.round) for part in parts
    ]
    assert wanted not in (0, alone[0])


def test_channels_that_are_alike_are_not_scaled() -> None:
    found = best_strength([weight()], torch.full((64,), 3.0), torch.eye(64), lambda w: nearest(w, 16).dequantized())
    assert found == 0


def test_scales_are_never_worse_than_none_and_better_where_channels_differ() -> None:
    x, values = inputs(), weight()
    second, sizes = moment(x), x.abs().mean(0)
    found = best_strength([values], sizes, second, lambda w: nearest(w, 16).dequantized())
    errors = {}
    for strength in (0.0, found):
        scales = channel_scales(sizes, strength)
        rounded = nearest(values * scales, 16).dequantized() / scales
        errors[strength] = ((x @ (rounded - values).T) ** 2).sum() / len(x)
        torch.testing.assert_close(
            errors[strength], output_error(values, rounded, second).sum().float(), rtol=1e-4, atol=0
        )
    assert found > 0
    assert errors[found] < 0.7 * errors[0.0]


def test_clipping_by_hand() -> None:
    """Range 0..3 makes steps of 1, and each 0.5 is wrong by 0.5. Half of it makes steps of 0.5; only the 3 is wrong, by 1.5.

    Where the first three matter, 3 * 100 * 0.25 = 75 becomes 2.25. Where the last does, 100 * 2.25 is more than 3 * 0.25.
    """
    values = torch.tensor([[0.5, 0.5, 0.5, 3.0]])
    grid = nearest_grid(values, 4, TWO_BITS)
    assert grid[0].item() == 1
    for matters, step, error in (((100.0, 100, 100, 1), 0.5, 2.25), ((1.0, 1, 1, 100), 1.0, 0.75)):
        second = torch.diag(torch.tensor(matters))
        scale, zero_point = clipped_grid(values, second, *grid, TWO_BITS)
        assert scale.item() == pytest.approx(step)
        assert zero_point.item() == 0
        made = on_grid(values, scale, zero_point, TWO_BITS).dequantized()
        assert output_error(values, made, second).item() == pytest.approx(error)


@pytest.mark.parametrize("size", [16, 64])
def test_clipping_lowers_the_error_of_every_row_or_leaves_it(size: int) -> None:
    values, second = weight(), moment(inputs())
    plain = output_error(values, nearest(values, size).dequantized(), second)
    made = on_grid(values, *clipped_grid(values, second, *nearest_grid(values, size)))
    clipped = output_error(values, made.dequantized(), second)
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert clipped.sum() < 0.9 * plain.sum()


def test_what_other_groups_do_to_the_output_counts() -> None:
    """Group by group, each share tried out on the error of the whole row."""
    values, second = weight(3, 32, seed=4), moment(inputs(32))
    for row in values:
        scale, zero_point = nearest_grid(row[None], 16)
        for group in range(2):
            part = row[None, 16 * group : 16 * group + 16]
            tried = [(scale, zero_point)]
            for share in SHARES:
                narrow, zero = scale.clone(), zero_point.clone()
                low, high = part.min().clamp_max(0) * share, part.max().clamp_min(0) * share
                narrow[0, group], zero[0, group] = scale_from_range(
                    low, high, Levels(0, 15, torch.uint8, symmetric=False)
                )
                tried.append((narrow, zero))
            errors = [output_error(row[None], on_grid(row[None], *grid).dequantized(), second).item() for grid in tried]
            scale, zero_point = tried[errors.index(min(errors))]
        found = clipped_grid(row[None], second, *nearest_grid(row[None], 16))
        torch.testing.assert_close(found[0], scale)
        assert torch.equal(found[1], zero_point)


def test_ratios_by_hand() -> None:
    """2/1, 1/2 and 4/4 are 2, 0.5 and 1, of which the one in the middle is the least that counts."""
    found = floored_ratios(torch.tensor([2.0, 1, 4]), torch.tensor([1.0, 2, 4]))
    assert found.tolist() == [2, 1, 1]
    assert floored_ratios(torch.tensor([3.0]), torch.tensor([0.0])).tolist() == [1]


def test_token_weights_by_hand() -> None:
    """Three image tokens of ratio 2 and a text token: 2 * (4 / 2) / 3 each, and (4 / 2) / 1."""
    assert token_weights(2, 3, 1) == (pytest.approx(4 / 3), 2)
    assert token_weights(1, 5, 5) == (1, 1)
    assert token_weights(7, 5, 0) == token_weights(7, 0, 5) == (1, 1)


def test_weighted_moments_are_those_of_each_modality_mixed() -> None:
    """Image tokens (1, 0), (1, 0), (1, 0) and a text token (0, 1): (2 * diag(1, 0) + diag(0, 1)) / 3."""
    image, text = token_weights(2, 3, 1)
    sums = Sums(full=True)
    sums.add(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]]), torch.tensor([image, image, image, text]))
    torch.testing.assert_close(sums.second_moment(), torch.diag(torch.tensor([2 / 3, 1 / 3])))
