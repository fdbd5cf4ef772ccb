"""Golden values computed by hand on small matrices, and laws that hold for any embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from mmcompress.evaluate import metrics

EYE = np.eye(3)


def pairs(*found: tuple[int, int]) -> np.ndarray:
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def test_normalise_keeps_zero_zero_and_shows_what_is_not_finite() -> None:
    found = metrics.normalise(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]]))
    np.testing.assert_allclose(found[0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(found[1], [0, 0])
    assert np.isnan(found[2:]).any(axis=1).all()


def test_normalise_survives_tiny_and_huge_vectors() -> None:
    np.testing.assert_allclose(metrics.normalise(np.array([[1e-30, 0], [0, 1e30]])), np.eye(2))


def test_ranks_by_hand() -> None:
    # Cosines of query (1, 0) with the gallery: 1, 0.6, 0, -1. The positive at 0.6 has one entry before it.
    gallery = np.array([[2.0, 0], [0.6, 0.8], [0, 1], [-1, 0]])
    queries = np.array([[1.0, 0], [5, 0], [1, 0], [-1, 0]])
    found = metrics.ranks(queries, gallery, pairs((0, 0), (1, 1), (2, 3), (3, 3)))
    assert found.tolist() == [1, 2, 4, 1]


def test_the_best_of_several_positives_counts_and_the_others_are_no_rivals() -> None:
    gallery = np.array([[1.0, 0], [0.9, 0.1], [0.8, 0.2], [0, 1]])
    assert metrics.ranks(np.array([[1.0, 0]]), gallery, pairs((0, 1), (0, 2))).tolist() == [2]
    assert metrics.ranks(np.array([[1.0, 0]]), gallery, pairs((0, 0), (0, 1), (0, 2))).tolist() == [1]
    assert metrics.ranks(np.array([[0.0, 1]]), gallery, pairs((0, 0), (0, 2))).tolist() == [2]


@pytest.mark.parametrize("value", [1.0, 0.0, np.nan, np.inf])
def test_constant_zero_and_nan_embeddings_rank_last(value: float) -> None:
    same = np.full((7, 5), value)
    assert metrics.ranks(same, same, metrics.labels_as_pairs(range(7))).tolist() == [7] * 7


def test_a_tie_up_to_rounding_is_a_tie() -> None:
    wobbling = np.ones((300, 64), np.float32) + np.random.default_rng(0).uniform(-1e-7, 1e-7, (300, 64))
    found = metrics.ranks(wobbling, wobbling, metrics.labels_as_pairs(range(300)))
    assert found.min() > 290


def test_one_nan_query_or_gallery_entry_hurts_itself_only_or_counts_against() -> None:
    queries, gallery = EYE.copy(), EYE.copy()
    queries[0] = np.nan
    assert metrics.ranks(queries, gallery, metrics.labels_as_pairs(range(3))).tolist() == [3, 1, 1]
    gallery[2] = np.nan
    assert metrics.ranks(EYE, gallery, metrics.labels_as_pairs(range(3))).tolist() == [2, 2, 3]


def test_a_query_without_positive_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="query 1 has no positive"):
        metrics.ranks(EYE, EYE, pairs((0, 0), (2, 2)))


def test_blocks_do_not_change_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    queries, gallery = rng.normal(size=(50, 8)), rng.normal(size=(40, 8))
    positive = np.stack([np.repeat(np.arange(50), 2), rng.integers(0, 40, 100)], axis=1)
    whole = metrics.ranks(queries, gallery, positive), metrics.nearest(queries, gallery, 5)
    monkeypatch.setattr(metrics, "CELLS", 130)
    np.testing.assert_array_equal(metrics.ranks(queries, gallery, positive), whole[0])
    np.testing.assert_array_equal(metrics.nearest(queries, gallery, 5), whole[1])


def test_permuting_queries_and_gallery_permutes_ranks() -> None:
    rng = np.random.default_rng(2)
    images, texts = rng.normal(size=(60, 8)), rng.normal(size=(60, 8))
    order, other = rng.permutation(60), rng.permutation(60)
    plain = metrics.ranks(images, texts, metrics.labels_as_pairs(range(60)))
    moved = metrics.ranks(images[order], texts[other], metrics.labels_as_pairs(np.argsort(other)[order]))
    np.testing.assert_array_equal(moved, plain[order])


def test_scale_of_embeddings_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    images, texts = rng.normal(size=(60, 8)), rng.normal(size=(60, 8))
    scaled = images * rng.uniform(0.1, 10, size=(60, 1))
    positive = metrics.labels_as_pairs(range(60))
    np.testing.assert_array_equal(metrics.ranks(scaled, texts, positive), metrics.ranks(images, texts, positive))


def test_recall_grows_with_k() -> None:
    rank = np.array([1, 2, 5, 6, 11])
    assert [metrics.within(rank, k).mean() for k in (1, 5, 10)] == pytest.approx([0.2, 0.6, 0.8])


def test_chance_by_hand() -> None:
    # One positive among 10: k / 10. Two among 4, k = 2: 1 - C(2, 2) / C(4, 2) = 5 / 6.
    assert metrics.chance(metrics.labels_as_pairs(range(10)), 10, 10, 3) == pytest.approx(0.3)
    assert metrics.chance(pairs((0, 0), (0, 1)), 1, 4, 2) == pytest.approx(5 / 6)
    assert metrics.chance(pairs((0, 0), (1, 0), (1, 1)), 2, 4, 1) == pytest.approx((0.25 + 0.5) / 2)


def test_chance_is_what_random_rankings_score() -> None:
    rng = np.random.default_rng(4)
    positive = np.stack([np.repeat(np.arange(2000), 2), np.tile([3, 7], 2000)], axis=1)
    rank = metrics.ranks(rng.normal(size=(2000, 16)), rng.normal(size=(30, 16)), positive)
    assert metrics.within(rank, 5).mean() == pytest.approx(metrics.chance(positive, 2000, 30, 5), abs=0.15)


def test_prompts_are_averaged_as_directions() -> None:
    # Class 0: (1, 0) and (0, 1), whatever their lengths, give the diagonal. Class 1: one direction twice.
    prompts = np.array([[10.0, 0], [0, 0.1], [0, -2], [0, -3]])
    expected = [[np.sqrt(0.5), np.sqrt(0.5)], [0, -1]]
    np.testing.assert_allclose(metrics.class_vectors(prompts, 2), expected, rtol=1e-6)


def test_cosines_by_hand() -> None:
    first, second = np.array([[1.0, 0], [1, 1], [0, 0], [1, 0]]), np.array([[2.0, 0], [1, 0], [1, 0], [np.nan, 0]])
    found = metrics.cosines(first, second)
    np.testing.assert_allclose(found[:3], [1, np.sqrt(0.5), 0], rtol=1e-6)
    assert np.isnan(found[3])


def test_nearest_is_ordered_and_prefers_the_lower_index() -> None:
    gallery = np.array([[0.0, 1], [1, 0], [1, 0], [0.9, 0.1]])
    assert metrics.nearest(np.array([[1.0, 0]]), gallery, 3).tolist() == [[1, 2, 3]]


def test_nan_is_nobodys_nearest() -> None:
    gallery = np.array([[np.nan, 1], [0.0, 1], [1, 0]])
    assert metrics.nearest(np.array([[1.0, 0]]), gallery, 3).tolist() == [[2, 1, 0]]


def test_overlap_ignores_order() -> None:
    found = metrics.overlap(np.array([[1, 2, 3, 4], [1, 2, 3, 4]]), np.array([[4, 3, 2, 1], [1, 7, 8, 9]]))
    assert found.tolist() == [1.0, 0.25]


def test_commonest_answer_by_hand() -> None:
    assert metrics.commonest(metrics.labels_as_pairs([0, 2, 2, 1]), 4).tolist() == [0, 1, 1, 0]
