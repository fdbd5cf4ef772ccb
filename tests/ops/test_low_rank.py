from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmcompress.ops.low_rank import (
    Directions,
    directions,
    largest_paying_rank,
    random_directions,
    root_of,
)


def case(out: int = 6, channels: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs (T, in) of uneven size, and a weight (out, in)."""
    torch.manual_seed(seed)
    mix = torch.randn(channels, channels, dtype=torch.float64) * torch.logspace(1, -1, channels, dtype=torch.float64)
    return torch.randn(300, channels, dtype=torch.float64) @ mix.T, torch.randn(out, channels, dtype=torch.float64)


def every(inputs: Tensor, weight: Tensor) -> dict[str, Directions]:
    moment = inputs.T @ inputs
    return {
        "svd-llm": directions(weight, root_of(moment), moment),
        "asvd": directions(weight, inputs.abs().mean(0) ** 0.5, moment),
        "svd": directions(weight, None, moment),
        "random": random_directions(weight, torch.Generator().manual_seed(0), moment),
    }


def error(inputs: Tensor, weight: Tensor, made: Directions, rank: int) -> float:
    up, down = made.factors(rank)
    return float((inputs @ (weight - up @ down).T).square().sum())


def test_the_seeded_example() -> None:
    """Inputs with channels of size 10, 1, 1 and 0.1, rank 1: whitened 21.5985, plain 57.92 (root of the summed squares)."""
    random = np.random.default_rng(2)
    inputs = torch.from_numpy(random.standard_normal((200, 4)) * np.array([10, 1, 1, 0.1]))
    weight = torch.from_numpy(random.standard_normal((3, 4)))
    made = every(inputs, weight)
    assert math.sqrt(error(inputs, weight, made["svd-llm"], 1)) == pytest.approx(21.5985, abs=1e-4)
    assert math.sqrt(float(made["svd-llm"].losses[1:].sum())) == pytest.approx(21.5985, abs=1e-4)
    assert math.sqrt(error(inputs, weight, made["svd"], 1)) == pytest.approx(57.92, abs=5e-3)


def test_which_direction_stays_by_hand() -> None:
    """W = diag(1, 3): its own largest singular value is the second. Inputs of size 10 and 1 make it diag(10, 3)."""
    weight, moment = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([100.0, 1.0]))
    whitened = directions(weight, root_of(moment), moment)
    assert whitened.losses.tolist() == pytest.approx([100, 9])
    up, down = whitened.factors(1)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([1.0, 0.0])).double())
    # The nearest matrix keeps the 3, and loses the 100.
    plain = directions(weight, None, moment)
    assert plain.losses.tolist() == pytest.approx([9, 100])
    # 16 ** 0.5 * 1 is more than 3, 16 ** 0 * 1 is less.
    sizes = torch.tensor([16.0, 1.0])
    assert directions(weight, sizes**0.5, moment).losses.tolist() == pytest.approx([100, 9])
    assert directions(weight, sizes**0, moment).losses.tolist() == pytest.approx([9, 100])


def test_outputs_that_matter_stay_by_hand() -> None:
    """White inputs, W = diag(1, 3); errors of the first output count 100 times as much: H' W = diag(10, 3)."""
    weight, gradients = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([100.0, 1.0]))
    made = directions(weight, outputs=root_of(gradients))
    assert made.losses.tolist() == pytest.approx([100, 9])
    up, down = made.factors(1)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([1.0, 0.0])).double())


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_losses_are_those_measured_and_full_rank_is_exact(shape: tuple[int, int]) -> None:
    inputs, weight = case(*shape)
    for name, made in every(inputs, weight).items():
        assert error(inputs, weight, made, min(shape)) < 1e-16 * float((inputs @ weight.T).square().sum()), name
        for rank in range(1, min(shape)):
            up, down = made.factors(rank)
            dropped = float((inputs @ (weight - up @ down).T).square().sum())
            assert dropped == pytest.approx(float(made.losses[rank:].sum()), rel=1e-6), name


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_nothing_of_a_rank_loses_less_than_the_whitened_factors(shape: tuple[int, int]) -> None:
    inputs, weight = case(*shape)
    made = every(inputs, weight)
    for rank in range(1, min(shape)):
        errors = {name: error(inputs, weight, each, rank) for name, each in made.items()}
        assert errors["svd-llm"] == min(errors.values())
        assert errors["svd-llm"] < 0.9 * errors["random"]


def test_both_sides_are_judged_together() -> None:
    """tr(G dW M dW') by plain arithmetic, and no other choice loses less."""
    inputs, weight = case()
    torch.manual_seed(1)
    gradients = torch.randn(200, 6, dtype=torch.float64) * torch.logspace(0, 2, 6, dtype=torch.float64)
    moment, outer = inputs.T @ inputs, gradients.T @ gradients
    both = directions(weight, root_of(moment), moment, root_of(outer))
    one = directions(weight, root_of(moment), moment)

    def judged(made: Directions, rank: int) -> float:
        up, down = made.factors(rank)
        gone = weight - up @ down
        return float((outer @ gone @ moment @ gone.T).trace())

    for rank in range(1, 6):
        assert judged(both, rank) == pytest.approx(float(both.losses[rank:].sum()), rel=1e-5)
        assert judged(both, rank) < judged(one, rank)
    torch.testing.assert_close(both.up @ both.down, weight)


def test_factors_are_equally_long_and_singular_inputs_are_no_obstacle() -> None:
    inputs, weight = case()
    inputs[:, 3] = 2 * inputs[:, 1]
    inputs[:, 4] = 0
    made = every(inputs, weight)["svd-llm"]
    up, down = made.factors(4)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    assert error(inputs, weight, made, 6) < 1e-16 * float((inputs @ weight.T).square().sum())


def test_a_root_of_what_rounding_has_made_indefinite() -> None:
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    moment, wanted = (turned * torch.tensor([4.0, 1, 0.1, least]) @ turned.T for least in (-0.05, 0))
    root = root_of(moment)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "multiple", "rank"),
    # 384 * 384 / 768 = 192 is no gain; 1536 * 384 / 1920 = 307.2; 6 * 3 / 9 = 2; 2 * 2 / 4 = 1.
    [((384, 384), 8, 184), ((1536, 384), 8, 304), ((6, 3), 1, 1), ((2, 2), 1, 0), ((48, 48), 32, 0)],
)
def test_the_largest_rank_that_pays(shape: tuple[int, int], multiple: int, rank: int) -> None:
    assert largest_paying_rank(shape, multiple) == rank
