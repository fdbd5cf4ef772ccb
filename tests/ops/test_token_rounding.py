"""Rounding by token: golden values by hand, independence of tokens, gradients."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops.token_rounding import (
    TOKEN_FLOAT8,
    TOKEN_INT8,
    TOKEN_UINT8,
    TokenGrid,
    in_steps,
    round_blocks,
    round_tokens,
    token_scale,
)

EVERY = pytest.mark.parametrize("grid", [TOKEN_UINT8, TOKEN_INT8, TOKEN_FLOAT8])


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_each_token_by_hand() -> None:
    # Steps of 2 and of 0.01: 5 lies between 2 and 3 steps and goes to the even one, 0.126 to 13 steps.
    x = torch.tensor([[254.0, 5.0, -3.1], [0.126, -1.27, 0.0]])
    assert token_scale(x, TOKEN_INT8).flatten().tolist() == pytest.approx([2.0, 0.01])
    found = round_tokens(x, TOKEN_INT8)
    assert found.flatten().tolist() == pytest.approx([254.0, 4.0, -4.0, 0.13, -1.27, 0.0])


def test_what_is_kept_of_a_token_by_hand() -> None:
    """Codes and scales: of the first token 127, 2.5 (to the even 2) and -1.55 steps of 2, of the second steps of 0.01."""
    steps, scale = in_steps(torch.tensor([[254.0, 5.0, -3.1], [0.126, -1.27, 0.0]]), TOKEN_INT8)
    assert scale.shape == (2, 1)
    assert scale.flatten().tolist() == pytest.approx([2.0, 0.01])
    assert steps[0].tolist() == pytest.approx([127.0, 2.5, -1.55])
    assert steps.round().tolist() == [[127, 2, -2], [13, -127, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_code_exceeds_the_largest_in_any_precision(dtype: torch.dtype) -> None:
    """Scales are rounded to it first: up or down, 127 and a bit is 127."""
    x = torch.cat([states(500, 16) * size for size in (0.1, 1.0, 50.0)]).to(dtype)
    steps, scale = in_steps(x, TOKEN_INT8)
    assert scale.dtype == dtype
    assert steps.round().abs().amax(-1).eq(127).all()
    assert ((steps.round() * scale.float() - x.float()).abs() <= scale.float() * 0.5001).all()


def test_float8_by_hand() -> None:
    # A step of 2: 34 is 17 steps, between 16 and 18, and goes to the even mantissa.
    assert round_tokens(torch.tensor([896.0, 34.0, 3.0]), TOKEN_FLOAT8).tolist() == [896.0, 32.0, 3.0]


def test_blocks_of_a_token_have_grids_of_their_own() -> None:
    x = torch.tensor([[254.0, 5.0, 0.126, -1.27]])
    assert round_blocks(x, 2, TOKEN_INT8).flatten().tolist() == pytest.approx([254.0, 4.0, 0.13, -1.27])
    x = states(3, 5, 96)
    want = torch.cat([round_tokens(part, TOKEN_INT8) for part in x.split(32, dim=-1)], dim=-1)
    assert torch.equal(round_blocks(x, 32, TOKEN_INT8), want)


@EVERY
def test_a_token_of_zeros_stays(grid: TokenGrid) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert not round_tokens(torch.zeros(2, 3, dtype=dtype), grid).any()


@EVERY
def test_a_token_does_not_know_its_batch(grid: TokenGrid) -> None:
    x = states(4, 7, 48)
    together = round_tokens(x, grid)
    for index in range(4):
        assert torch.equal(round_tokens(x[index], grid), together[index])


def test_how_integers_are_stored_changes_nothing() -> None:
    assert torch.equal(round_tokens(states(5, 9), TOKEN_UINT8), round_tokens(states(5, 9), TOKEN_INT8))


def test_off_by_half_a_step_at_most() -> None:
    x = states(50, 64)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((round_tokens(x, TOKEN_INT8) - x).abs() <= step * 0.5001).all()


@EVERY
def test_gradients_pass_straight_through(grid: TokenGrid) -> None:
    x = states(3, 8).requires_grad_()
    (round_tokens(x, grid) * torch.arange(8.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(8.0).expand(3, 8))
