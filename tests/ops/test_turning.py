"""Turned heads: nothing changes while all directions are there, and the first ones carry most."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.turning import logit_turns, value_turns


def moments(heads: int, width: int, seed: int) -> Tensor:
    made = torch.randn(heads, width, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made @ made.mT / 40


def test_logit_turns_by_hand() -> None:
    """Variances of queries 4, 1, 9 and of keys 1, 25, 1: products of 2, 5 and 3, in that order 5, 3, 2."""
    queries, keys = (
        torch.diag(torch.tensor(d, dtype=torch.float64))[None] for d in ((4.0, 1.0, 9.0), (1.0, 25.0, 1.0))
    )
    turn, _, keys_turn = logit_turns(queries, keys)
    assert [int(row.abs().argmax()) for row in turn[0]] == [1, 2, 0]
    # S^1/2 A^-1 and S^-1/2 A: channel 1 with A = 1 and S = 5, channel 2 with A = 3 and S = 3.
    torch.testing.assert_close(turn[0].abs().amax(1).square(), torch.tensor([5.0, 1 / 3, 0.5]).double())
    torch.testing.assert_close(keys_turn[0].abs().amax(1).square(), torch.tensor([1 / 5, 3.0, 2.0]).double())


def test_products_stay_and_the_first_directions_keep_what_the_singular_values_say() -> None:
    queries, keys = moments(2, 6, 0), moments(2, 6, 1)
    turn, back, keys_turn = logit_turns(queries, keys)
    same = torch.eye(6, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(turn @ back, same)
    torch.testing.assert_close(turn.mT @ keys_turn, same)
    for kept in range(1, 6):
        # What is left out is q' P k with P of the last directions; its mean square is tr(P' Cq P Ck).
        left_out = turn[:, kept:].mT @ keys_turn[:, kept:]
        lost = (left_out.mT @ queries @ left_out @ keys).diagonal(dim1=1, dim2=2).sum(1)
        sizes = torch.linalg.eigvals(queries @ keys).real.sort(descending=True).values  # squares of the singular values
        torch.testing.assert_close(lost, sizes[:, kept:].sum(1))


def test_value_turns_by_hand() -> None:
    """Values of variance 1, 4, 9 that the reader takes 5, 1 and 1 times: 25, 4 and 9 in the mean square."""
    reader = torch.diag(torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64))[None]
    turn, back = value_turns(reader, torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))[None])
    assert [int(row.abs().argmax()) for row in turn[0]] == [0, 2, 1]
    torch.testing.assert_close((reader @ back)[0].square().sum(0), torch.tensor([25.0, 9.0, 4.0]).double())


def test_turned_values_are_uncorrelated_and_read_as_before() -> None:
    values = moments(3, 5, 2)
    reader = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))  # fewer rows than D
    turn, back = value_turns(reader, values)
    same = torch.eye(5, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(turn @ values @ turn.mT, same)
    torch.testing.assert_close(turn @ back, same)
    sizes = (reader @ back).square().sum(1)
    assert (sizes.diff(dim=-1) <= 1e-9).all()
    left = torch.linalg.eigvalsh(reader @ values @ reader.mT).flip(-1)
    torch.testing.assert_close(sizes, torch.cat([left, torch.zeros(3, 1, dtype=torch.float64)], 1))


def test_what_never_varies_can_still_be_turned() -> None:
    nothing = torch.zeros(1, 4, 4, dtype=torch.float64)
    turn, back, keys = logit_turns(nothing, moments(1, 4, 5))
    for made in (turn, back, keys, *value_turns(torch.ones(1, 3, 4, dtype=torch.float64), nothing)):
        assert made.isfinite().all()
    torch.testing.assert_close(turn @ back, torch.eye(4, dtype=torch.float64)[None])
