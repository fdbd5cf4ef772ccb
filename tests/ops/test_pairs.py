from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.ops.complete_matching import energy_matching, guided_matching
from mmcompress.ops.matching import bipartite_soft_matching
from mmcompress.ops.pairs import amounts_for_almost_all, bipartite_pairs, energy_pairs, guided_pairs, mean_amounts
from mmcompress.ops.ranks import directions
from mmcompress.ops.schedule import kept_share, largest_merge, solve_keep, solve_left, tokens_after

every_way = pytest.mark.parametrize("pairs", [bipartite_pairs, energy_pairs, guided_pairs])


def keys(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, 8, generator=torch.Generator().manual_seed(seed))


def test_bipartite_golden() -> None:
    """ToMe's: token 4 and 3 are 0.9950 alike, 2 and 1 0.9929; the class token 0 is in no pair."""
    rows = torch.tensor([[[1, 0], [1, 0.1], [0.9, 0.2], [0, 1], [0.1, 1], [-1, 0.3]]])
    torch.testing.assert_close(bipartite_pairs(rows, 1), torch.tensor([[0.9950, 0.9929]]), atol=1e-4, rtol=0)


def test_energy_golden() -> None:
    """PiToMe's, in the order of energy 2, 1, 0, 3, 4, 5: 2 goes into 1, then 0 into 1 rather than 3, then 4 into 5."""
    rows = torch.tensor([[[1, 0], [0.98, 0.2], [0.95, 0.3], [0, 1], [-1, 0], [-0.6, -0.8]]])
    torch.testing.assert_close(energy_pairs(rows, 0, 0.9), torch.tensor([[0.9945, 0.9798, 0.6]]), atol=1e-4, rtol=0)


def test_guided_by_hand() -> None:
    """Without a class token the mean guides: along (2.6, 1.8), so importances are 0.82, 0.82, 0.95 and 0.57.

    Ranked by their most similar: 0 and 1 (the same, the earlier first), then 2 and 3. So 0 asks 1, 1 asks 2 (0.6) and 2 asks 3
    (0.8): less importance that is 0.18, -0.22 and -0.15. First 0 goes, then 2.
    """
    rows = torch.tensor([[[1.0, 0], [1.0, 0], [0.6, 0.8], [0, 1.0]]])
    torch.testing.assert_close(guided_pairs(rows), torch.tensor([[1.0, 0.8]]), atol=1e-6, rtol=0)
    assert [row.nonzero().flatten().tolist() for row in guided_matching(rows, 2)[0][0]] == [[0, 1], [2, 3]]


@every_way
@pytest.mark.parametrize(("tokens", "protected"), [(12, 1), (13, 1), (12, 0), (13, 2), (3, 1), (2, 1), (1, 1)])
def test_rows_fall_and_have_as_many_pairs_as_a_block_can_merge(pairs: Any, tokens: int, protected: int) -> None:
    found = pairs(keys(3, tokens), protected)
    assert found.shape == (3, largest_merge(tokens, protected))
    assert (found.diff(dim=1) <= 0).all()
    changed = keys(3, tokens)
    changed[:, :protected] = -changed[:, :protected]
    if pairs is not guided_pairs:  # where the class token says what matters
        assert torch.equal(pairs(changed, protected), found)


@pytest.mark.parametrize(
    ("pairs", "match"), [(bipartite_pairs, bipartite_soft_matching), (energy_pairs, energy_matching)]
)
def test_merged_pairs_are_as_alike_as_said(pairs: Any, match: Any) -> None:
    """Whatever is merged has a partner in its row that is at least as alike as the row's number says."""
    given = keys(4, 13)
    cosine = directions(given) @ directions(given).mT
    said = pairs(given, 1)
    for merged in range(1, 7):
        for assignment, alike, numbers in zip(match(given, merged, 1), cosine, said, strict=True):
            for members in (row.nonzero().flatten() for row in assignment if row.sum() > 1):
                among = alike[members][:, members]
                assert among.amin(dim=1).max() >= numbers[merged - 1] - 1e-6


@every_way
def test_padding_is_in_no_pair_and_changes_none(pairs: Any) -> None:
    given, sizes = keys(2, 12), torch.ones(2, 12)
    sizes[:, 9:] = 0
    found = pairs(given, 1, sizes=sizes)
    torch.testing.assert_close(found[:, :4], pairs(given[:, :9], 1))
    given[:, 9:] = 1.0
    assert torch.equal(pairs(given, 1, sizes=sizes), found)
    assert found.shape == (2, 5)
    # Of eight tokens four are even or sources; of CrossGET's any goes that has another behind it.
    assert (found[:, 4] < -2).all() == (pairs is not guided_pairs)


def test_amounts_by_hand() -> None:
    blocks = [torch.tensor([[0.9, 0.5], [0.7, 0.3]]), torch.tensor([[0.8, 0.8], [0.6, -0.5]]), torch.zeros(2, 0)]
    amounts = mean_amounts(blocks)
    assert amounts(0.0) == [0, 0, 0]
    assert amounts(0.35) == [1, 1, 0]  # from 0.651 on: 0.9, 0.7; 0.8 twice
    assert amounts(0.65) == [1.5, 1.5, 0]
    assert amounts(2.5) == [2, 2, 0]
    assert amounts_for_almost_all(blocks, 0.5) == [1, 1, 0]
    assert amounts_for_almost_all(blocks, 0.8) == [0, 0, 0]
    # Tokens that are the same count as alike from the first step on, and not before it.
    same = mean_amounts([torch.ones(3, 2)])
    assert (same(0.0), same(0.01)) == ([0], [2])
    # Of twenty samples one may have fewer.
    assert amounts_for_almost_all([torch.tensor([[0.1]] + [[0.9]] * 19)], 0.5) == [1]
    assert amounts_for_almost_all([torch.tensor([[0.1]] * 2 + [[0.9]] * 19)], 0.5) == [0]


def test_the_most_alike_are_merged_by_hand() -> None:
    """Of 0.9, 0.5, 0.1 and 0.8, 0.7, 0.2 three are to go: 0.9, 0.8 and 0.7. Early ones count for two blocks' work."""
    amounts = mean_amounts([torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.8, 0.7, 0.2]])])
    assert solve_left(5, 8, 0, 2, amounts=amounts) == [1, 2]
    assert solve_keep(1 - 4 / 16, 8, 0, 2, amounts=amounts) == [1, 2]
    assert solve_keep(1.0, 8, 0, 2, amounts=amounts) == [0, 0]
    assert solve_left(8, 8, 0, 2, amounts=amounts) == [0, 0]


@pytest.mark.parametrize(("every", "first"), [(1, 0), (2, 1), (3, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_budgets_hold_whatever_is_alike(every: int, first: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.rand(5, 24, generator=generator).sort(descending=True).values ** (1 + index) for index in range(7)]
    blocks = [rows if index in range(first, 7, every) else rows[:, :0] for index, rows in enumerate(blocks)]
    for left in (12, 20, 33, 49):
        made = solve_left(left, 50, 1, 7, every=every, first=first, amounts=mean_amounts(blocks))
        assert sum(made) == 50 - left
        assert_possible(made, every, first)
    for keep in (0.9, 0.75, 0.6):
        made = solve_keep(keep, 50, 1, 7, every=every, first=first, amounts=mean_amounts(blocks))
        assert -1e-9 <= kept_share(made, 50) - keep + 0.5 / (7 * 50) < 1 / 50
        assert_possible(made, every, first)


def assert_possible(made: list[int], every: int, first: int) -> None:
    before = [50, *tokens_after(made, 50)]
    assert all(0 <= merged <= largest_merge(tokens, 1) for merged, tokens in zip(made, before, strict=False))
    assert not any(merged for index, merged in enumerate(made) if index not in range(first, 7, every))
