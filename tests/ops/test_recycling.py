"""Tokens that come back as means: DPC-kNN by hand, and how many."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops.recycling import counts_recycled, density_peaks, recycled


def test_how_many_come_back() -> None:
    """Of 90 that leave, 27 are clustered, one in ten and one; at least one token stays as it is."""
    images, kept = torch.tensor([100, 20, 3, 0, 64, 12]), torch.tensor([10, 5, 3, 0, 1, 11])
    pool, centres = counts_recycled(images, kept)
    assert pool.tolist() == [27, 4, 0, 0, 0, 0]
    assert centres.tolist() == [3, 1, 0, 0, 0, 0]


def test_density_peaks_golden() -> None:
    """Points at 0, 0.1 and 1: squared distances .01, 1 and .81, so mean ones, its own among them, of .3367, .2733 and .6033."""
    points = torch.tensor([0.0, 0.1, 1.0, 5.0])
    distance = (points[:, None] - points).square()[None]
    among = torch.tensor([[True, True, True, False]])
    found = density_peaks(distance, among)[0, :3]
    # The second is the densest; to it the others have .1 and .9.
    expected = torch.tensor([0.71414 * 0.1, 0.76084 * 1.0, 0.54698 * 0.9])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_only_the_five_nearest_count() -> None:
    """Six points in one place and one far away: of the six, each has five at distance 0."""
    points = torch.tensor([0.0] * 6 + [2.0])
    distance = (points[:, None] - points).square()[None]
    found = density_peaks(distance, torch.ones(1, 7, dtype=torch.bool))
    # Equal ones come after the first, at distance 0; the far one has itself at 0 and four at 4: exp(-16 / 5), at 2 from them.
    expected = torch.tensor([[2.0, 0, 0, 0, 0, 0, 2 * torch.exp(torch.tensor(-3.2)).item()]])
    torch.testing.assert_close(found, expected)


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two words around 24 image tokens, the better the earlier; those of places 12 and later point to two sides in turn."""
    torch.manual_seed(0)
    sides = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(13, 1)
    tokens = (sides + 0.01 * torch.randn(26, 2))[None]
    image = torch.ones(1, 26, dtype=torch.bool)
    image[0, [0, 25]] = False
    return tokens, image, -torch.arange(26.0)[None]


def test_the_best_of_what_leaves_comes_back_as_a_mean() -> None:
    tokens, image, scores = case()
    stays, made = recycled(tokens, image, scores, torch.tensor([4]))
    # 20 leave, 6 of them are clustered into one: the places behind the three that stay.
    assert stays[0].nonzero()[:, 0].tolist()[:3] == [1, 2, 3]
    (centre,) = stays[0].nonzero()[3:, 0].tolist()
    assert centre in range(4, 10)
    expected = torch.zeros(26)
    expected[4:10] = 1 / 6
    torch.testing.assert_close(made[0, centre], expected)
    others = [place for place in range(26) if place != centre]
    assert torch.equal(made[0, others], torch.eye(26)[others])


def test_clusters_are_those_of_the_nearest_centre() -> None:
    tokens = torch.tensor(
        [
            [
                [0.0],
                [0.0],
                [0.0],
                *[[5.0 + 0.01 * index] for index in range(6)],
                *[[9.0 - 0.01 * index] for index in range(30)],
            ]
        ]
    )
    image, scores = torch.ones(1, 39, dtype=torch.bool), -torch.arange(39.0)[None]
    stays, made = recycled(tokens, image, scores, torch.tensor([5]))
    # 34 leave, 10 of them in two clusters: places 3 to 12, six around 5 and four around 9.
    assert counts_recycled(torch.tensor([39]), torch.tensor([5]))[1].tolist() == [2]
    one, two = stays[0].nonzero()[3:, 0].tolist()
    assert made[0, one].nonzero()[:, 0].tolist() == list(range(3, 9))
    assert made[0, two].nonzero()[:, 0].tolist() == list(range(9, 13))


def test_centres_that_are_alike_each_have_a_token() -> None:
    """39 equal tokens of which 5 stay: 10 are clustered into two; the second centre has itself at least."""
    stays, made = recycled(
        torch.ones(1, 39, 2), torch.ones(1, 39, dtype=torch.bool), torch.zeros(1, 39), torch.tensor([5])
    )
    assert stays.sum() == 5
    torch.testing.assert_close(made.sum(dim=-1), torch.ones(1, 39))


@pytest.mark.parametrize("kept", [1, 2, 24])
def test_as_many_stay_as_were_asked_for(kept: int) -> None:
    tokens, image, scores = case()
    stays, made = recycled(tokens, image, scores, torch.tensor([kept]))
    assert stays.sum() == kept
    torch.testing.assert_close(made.sum(dim=-1), torch.ones(1, 26))
    if kept in (1, 24):
        assert torch.equal(made[0], torch.eye(26))


def test_a_batch_is_its_rows_and_words_are_left_alone() -> None:
    tokens, image, scores = case()
    fewer = image.clone()
    fewer[0, 8:] = False
    both = recycled(
        tokens.repeat(3, 1, 1), torch.cat([image, fewer, ~image & False]), scores.repeat(3, 1), torch.tensor([4, 3, 0])
    )
    for index, (mask, kept) in enumerate(((image, 4), (fewer, 3), (~image & False, 0))):
        alone = recycled(tokens, mask, scores, torch.tensor([kept]))
        assert torch.equal(both[0][index], alone[0][0])
        torch.testing.assert_close(both[1][index], alone[1][0])
    assert both[0][2].sum() == 0
    # A further token, in an answer.
    stays, made = recycled(tokens[:, :1], image[:, :1], scores[:, :1], torch.tensor([0]))
    assert stays.tolist() == [[0.0]]
    assert made.tolist() == [[[1.0]]]
