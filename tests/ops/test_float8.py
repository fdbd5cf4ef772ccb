"""E4M3: golden values from the format's definition, every number of it, and what must hold for any."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops.float8 import FLOAT8, fake_float8, nearest_float8, to_float8


def by_definition() -> list[float]:
    """Every finite E4M3 number: eight steps in each binade from 2^-6 on, the same steps below it; 480 would be NaN."""
    below = [m / 8 * 2.0**-6 for m in range(8)]
    above = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return below + above


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (448.0, 448.0),
        (449.0, 448.0),
        (1e9, 448.0),
        (-1e9, -448.0),
        (17.0, 16.0),  # between 16 (mantissa 0) and 18 (mantissa 1): to the even one
        (19.0, 20.0),  # between 18 (1) and 20 (2)
        (17.01, 18.0),
        (1.0625, 1.0),  # between 1 and 1.125
        (1.1875, 1.25),
        (2.0**-9, 2.0**-9),  # the smallest
        (2.0**-10, 0.0),  # half of it
        (3 * 2.0**-10, 2.0**-8),  # between 1 and 2 steps
        (0.0, 0.0),
    ],
)
def test_golden_values(x: float, want: float) -> None:
    assert nearest_float8(torch.tensor(x)).item() == want


def test_every_number_stays_and_what_lies_between_goes_to_the_nearer() -> None:
    numbers = torch.tensor(by_definition())
    assert len(numbers) == 127
    assert torch.equal(nearest_float8(numbers), numbers)
    assert torch.equal(nearest_float8(-numbers), -numbers)
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) ** 4 * 448
    distances = (x[:, None] - numbers).abs()
    assert torch.equal((nearest_float8(x) - x).abs(), distances.amin(1))


def test_a_scale_brings_the_largest_to_448() -> None:
    x = torch.tensor([[0.5, -2.0], [7.0, 1.0]])
    codes = to_float8(x, x.abs().amax(1, keepdim=True) / 448)
    # 112/448 of the first row and 64/448 of the second are numbers of the format.
    assert codes.float().tolist() == [[112.0, -448.0], [448.0, 64.0]]
    assert codes.dtype == FLOAT8.dtype


def test_gradients_pass_inside_and_stop_outside() -> None:
    x = torch.tensor([0.3, 1.0, 448.5, -900.0], requires_grad=True)
    made = fake_float8(x, torch.tensor(1.0))
    assert made.tolist() == [0.3125, 1.0, 448.0, -448.0]
    made.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_half_precision_is_rounded_in_float32() -> None:
    x = torch.tensor([3.0, 100.0], dtype=torch.float16)
    assert fake_float8(x, torch.tensor(0.25, dtype=torch.float16)).tolist() == [
        3.0,
        96.0,
    ]  # 400 is between 384 (mantissa 4) and 416 (5)
