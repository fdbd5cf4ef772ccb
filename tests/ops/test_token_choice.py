"""Which tokens go on: golden values by hand, and laws of every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops import token_choice

Method = Callable[[Tensor, Tensor, int], Tensor]
METHODS: dict[str, Method] = {
    "divprune": lambda tokens, scores, kept: token_choice.spread_farthest(tokens, kept),
    "clusters": lambda tokens, scores, kept: token_choice.clustered(tokens, kept),
    "attention": lambda tokens, scores, kept: token_choice.best_scored(scores, kept),
    "visionzip": lambda tokens, scores, kept: token_choice.dominant_and_contextual(scores, tokens, kept),
    "prumerge": lambda tokens, scores, kept: token_choice.kept_with_neighbours(scores, tokens, kept),
    "lftr": lambda tokens, scores, kept: token_choice.least_redundant(tokens, kept),
    "tome": lambda tokens, scores, kept: token_choice.halved(tokens, kept),
    "grid": lambda tokens, scores, kept: token_choice.evenly(tokens.shape[1], kept),
    "random": lambda tokens, scores, kept: token_choice.standing_at(
        token_choice.drawn(tokens.shape[1], kept, torch.Generator().manual_seed(0)), tokens.shape[1]
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def noise(batch: int, count: int, width: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C), and scores (B, N) that sum to 1."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, count, width, generator=generator)
    return tokens, torch.rand(batch, count, generator=generator).softmax(dim=-1)


def kept_of(rows: Tensor) -> list[int]:
    """The tokens of rows (1, M, N) that each hold a single 1."""
    assert ((rows == 0) | (rows == 1)).all()
    return [row.nonzero().item() for row in rows[0]]  # type: ignore[misc]


@every_method
def test_all_kept_is_the_identity(method: Method) -> None:
    tokens, scores = noise(2, 12)
    assert torch.equal(method(tokens, scores, 12).expand(2, -1, -1), torch.eye(12).expand(2, -1, -1))


@every_method
@pytest.mark.parametrize("kept", [1, 2, 7, 31])
def test_rows_are_shares(method: Method, kept: int) -> None:
    tokens, scores = noise(3, 48)
    rows = method(tokens, scores, kept)
    assert rows.shape[-2:] == (kept, 48)
    assert torch.allclose(rows.sum(dim=-1), torch.ones(()))
    assert (rows >= 0).all()
    # No token goes into two, but a neighbour of two in PruMerge.
    assert method is METHODS["prumerge"] or ((rows > 0).sum(dim=-2) <= 1).all()


@every_method
def test_a_batch_equals_its_samples(method: Method) -> None:
    tokens, scores = noise(3, 30)
    together = method(tokens, scores, 8).expand(3, -1, -1)
    for index in range(3):
        part = slice(index, index + 1)
        assert torch.allclose(method(tokens[part], scores[part], 8).expand(1, -1, -1), together[part], atol=1e-6)


@pytest.mark.parametrize("name", ["divprune", "clusters", "attention"])
def test_which_tokens_does_not_depend_on_where_they_are(name: str) -> None:
    tokens, scores = noise(1, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    made = METHODS[name](tokens, scores, 6) @ tokens
    moved = METHODS[name](tokens[:, order], scores[:, order], 6) @ tokens[:, order]
    apart = torch.linalg.norm(made[0, :, None] - moved[0], dim=-1)
    assert apart.amin(dim=1).max() < 1e-5
    assert apart.amin(dim=0).max() < 1e-5


def test_divprune_golden() -> None:
    """Farthest from its nearest is 3 (distance 1), then 0 (2 from it), then 2 (1 from both): in order 0, 2, 3."""
    tokens = torch.tensor([[[1, 0], [0.99, 0.1], [0, 1], [-1, 0], [0.1, 0.95]]])
    assert kept_of(token_choice.spread_farthest(tokens, 1)) == [3]
    assert kept_of(token_choice.spread_farthest(tokens, 2)) == [0, 3]
    assert kept_of(token_choice.spread_farthest(tokens, 3)) == [0, 2, 3]


def test_best_scored_prefers_the_earlier_of_equal_ones() -> None:
    assert kept_of(token_choice.best_scored(torch.tensor([[0.1, 0.4, 0.1, 0.4, 0.4]]), 2)) == [1, 3]


def test_clusters_golden() -> None:
    """Two directions, of three and two tokens: their means, of the tokens as they are, ordered by mean place."""
    tokens = torch.tensor([[[0, 2], [0, 4], [3, 0], [0, 3], [1.0, 0]]])
    rows = token_choice.clustered(tokens, 2)
    assert torch.allclose(rows, torch.tensor([[[1 / 3, 1 / 3, 0, 1 / 3, 0], [0, 0, 0.5, 0, 0.5]]]))
    assert torch.allclose(rows @ tokens, torch.tensor([[[0, 3.0], [2, 0]]]))


def test_clusters_move_to_the_middle_of_their_members() -> None:
    """They begin at 0 and 90 degrees: 44 goes to 0 first. From the middles, 15 and 67, it is nearer to the second."""
    angles = torch.tensor([0.0, 2, 44, 50, 60, 90]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    first = token_choice.spread_farthest(tokens, 2)
    assert kept_of(first) == [0, 5]
    rows = token_choice.clustered(tokens, 2)
    assert torch.equal(rows[0] > 0, torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool())


def test_one_cluster_is_the_mean_and_copies_come_together_first() -> None:
    tokens, _ = noise(1, 9)
    assert torch.allclose(token_choice.clustered(tokens, 1) @ tokens, tokens.mean(dim=1, keepdim=True), atol=1e-6)
    copies = tokens.repeat_interleave(3, dim=1)
    assert torch.allclose(token_choice.clustered(copies, 9) @ copies, tokens, atol=1e-5)


def test_pooled_is_average_pooling() -> None:
    tokens = torch.randn(1, 3, 16, 16)
    for small in ((8, 8), (5, 7), (16, 16), (1, 1)):
        expected = torch.nn.functional.adaptive_avg_pool2d(tokens, small).flatten(2).mT
        assert torch.allclose(token_choice.pooled((16, 16), small) @ tokens.flatten(2).mT, expected, atol=1e-5)


def test_evenly_golden() -> None:
    assert kept_of(token_choice.evenly(6, 3)[None]) == [1, 3, 5]
    assert kept_of(token_choice.evenly(7, 2)[None]) == [1, 5]


def test_lftr_golden() -> None:
    """Three alike at 0, 10 and 20 degrees, one at 90, one at 200: the mean cosines are .40, .43, .45, .23 and -.45."""
    angles = torch.tensor([0.0, 10, 20, 90, 200]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert kept_of(token_choice.least_redundant(tokens, 2)) == [3, 4]
    assert kept_of(token_choice.least_redundant(tokens, 3)) == [0, 3, 4]
    assert kept_of(token_choice.least_redundant(100 * tokens, 3)) == [0, 3, 4]


def test_visionzip_golden() -> None:
    """Of 7 tokens 6 are kept: 5 dominant, and the mean of the other two, 0 and 3."""
    scores = torch.tensor([[0.0, 0.2, 0.3, 0.01, 0.1, 0.15, 0.24]])
    tokens = torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(0))
    rows = token_choice.dominant_and_contextual(scores, tokens, 6)
    expected = torch.zeros(6, 7)
    for row, token in enumerate([1, 2, 4, 5, 6]):
        expected[row, token] = 1
    expected[5, [0, 3]] = 0.5
    assert torch.allclose(rows[0], expected)


def test_visionzip_leaves_no_row_empty_where_tokens_are_equal() -> None:
    rows = token_choice.dominant_and_contextual(torch.arange(64.0)[None], torch.ones(1, 64, 4), 32)
    assert torch.allclose(rows.sum(dim=-1), torch.ones(32))


def test_prumerge_golden() -> None:
    """Kept is token 2 with its neighbours 0 and 1, which share by score; what is in no neighbourhood comes last, as one."""
    scores = torch.tensor([[0.1, 0.3, 0.5, 0.1]])
    tokens = torch.tensor([[[1, 0.1], [1, 0.2], [1, 0], [1, 0.3]]])
    rows = token_choice.kept_with_neighbours(scores, tokens, 2)
    # All others are among its 32 neighbours here, the kept one weighing 0.5 of 1.
    assert torch.allclose(rows[0, 0], torch.tensor([0.1, 0.3, 0.5, 0.1]), atol=1e-5)
    assert torch.allclose(rows[0, 1], torch.tensor([0.2, 0.6, 0, 0.2]), atol=1e-5)


def test_tome_brings_the_most_similar_pairs_together() -> None:
    tokens = torch.tensor([[[1, 0], [1, 0.01], [0, 1], [0, -1.0]]])
    assert torch.allclose(
        token_choice.halved(tokens, 3), torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]])
    )


def test_places_put_means_back_and_give_dropped_tokens_the_nearest() -> None:
    tokens = torch.tensor([[[1, 0], [1, 0.1], [0, 1], [0.2, 0.9]]])
    merged = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]])
    expected = torch.tensor([[[1, 0], [1, 0], [0, 1], [0, 1.0]]])
    assert torch.equal(token_choice.places(merged, tokens), expected)
    chosen = torch.tensor([[[0, 1, 0, 0], [0, 0, 1.0, 0]]])
    assert torch.equal(token_choice.places(chosen, tokens), expected)


@pytest.mark.parametrize("kept", [0, 13])
@every_method
def test_impossible_numbers_are_refused(method: Method, kept: int) -> None:
    tokens, scores = noise(1, 12)
    with pytest.raises(UsageError, match=f"cannot keep {kept} of 12 tokens") as caught:
        method(tokens, scores, kept)
    assert caught.value.hint
