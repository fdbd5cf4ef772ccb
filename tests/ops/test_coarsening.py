"""Runs of tokens that stand as one: by hand, and what holds for any."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mmcompress.ops.coarsening import added_back, coarse, tokens_left
from mmcompress.ops.merging import merge


def members(assignment: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in assignment[0]]


def everyone(count: int) -> Tensor:
    return torch.ones(1, count, dtype=torch.bool)


def test_golden() -> None:
    """Behind the VIP runs of three, the last of two; means .2, .1 and .5, so the second goes first, then the first."""
    looked_at = torch.tensor([[9.0, 0.1, 0.4, 0.1, 0.2, 0.0, 0.1, 0.5, 0.5]])
    made = {keep: members(coarse(looked_at, everyone(9), keep, 3, 1)) for keep in (1000, 889, 778, 667, 556, 1)}
    assert made[1000] == [[0], [1], [2], [3], [4], [5], [6], [7], [8]]
    assert made[889] == [[0], [1], [2], [3], [4], [5], [6], [7], [8]]
    assert made[778] == [[0], [1], [2], [3], [4, 5], [6], [7], [8]]
    assert made[667] == [[0], [1], [2], [3], [4, 5, 6], [7], [8]]
    assert made[556] == [[0], [1, 2], [3], [4, 5, 6], [7], [8]]
    assert made[1] == [[0], [1, 2, 3], [4, 5, 6], [7, 8]]


def test_what_is_left_of_how_many() -> None:
    assert [tokens_left(count, 500, 4, 1) for count in (1, 2, 3, 8, 9, 20)] == [1, 2, 2, 4, 5, 10]
    assert tokens_left(20, 1, 4, 1) == 6  # the protected one, and five runs
    given = torch.tensor([1, 2, 3, 8, 9, 20])
    assert tokens_left(given, 500, 4, 1).tolist() == [1, 2, 2, 4, 5, 10]


@pytest.mark.parametrize("keep", [1, 137, 500, 863, 999])
@pytest.mark.parametrize("protected", [0, 1, 3])
@pytest.mark.parametrize("run", [2, 5, 16])
def test_rows_for_the_longest_are_enough_for_all(keep: int, protected: int, run: int) -> None:
    left = [tokens_left(count, keep, run, protected) for count in range(protected + 1, 200)]
    assert all(0 <= later - before <= 1 for before, later in itertools.pairwise(left))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows_alone(side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, longest = (23, 9, 2, 16), 23
    looked_at = torch.rand(len(lengths), longest, generator=generator)
    present = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    if side == "left":
        present = present.flip(1)
    together = coarse(looked_at, present, 400, 4, 1)
    assert together.shape[1] == tokens_left(longest, 400, 4, 1)
    for row, (mask, count) in enumerate(zip(present, lengths, strict=True)):
        alone = coarse(looked_at[row, mask][None], everyone(count), 400, 4, 1)[0]
        assert torch.equal(together[row, : len(alone), mask], alone)
        assert not together[row, len(alone) :].any()
        assert not together[row][:, ~mask].any()
        assert alone.sum(dim=0).tolist() == [1] * count
        assert (alone.sum(dim=1) >= 1).all()


def test_what_a_block_adds_to_a_mean_it_adds_to_each() -> None:
    """So a run that was coarse can be fine again: what told its tokens apart is still there."""
    tokens = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    assignment = coarse(torch.ones(1, 9), everyone(9), 1, 4, 1)
    means, sizes = merge(tokens, assignment)
    assert sizes.tolist() == [[1, 4, 4]]
    made = added_back(tokens, assignment, means, 3 * means)
    torch.testing.assert_close(made[:, 1:5] - tokens[:, 1:5], (2 * means[:, 1:2]).expand(-1, 4, -1))
    torch.testing.assert_close(made[:, 1:5].mean(dim=1), 3 * means[:, 1])
    assert torch.equal(added_back(tokens, assignment, means, means), tokens)
