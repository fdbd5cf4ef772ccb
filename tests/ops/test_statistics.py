"""Laws and hand-computed values of the intervals every number carries."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mmcompress.ops import statistics
from mmcompress.ops.statistics import Estimate, bootstrap, paired_difference, percentiles, proportion, ratio_of_medians


def test_estimate_reads_like_a_sentence_and_survives_json() -> None:
    estimate = Estimate(0.431, 0.412, 0.45, 956)
    assert str(estimate) == "0.431 [0.412, 0.450] n=956"
    assert Estimate.from_json(json.loads(json.dumps(estimate.to_json()))) == estimate


def test_unbounded_interval_is_written_as_null_and_read_back() -> None:
    estimate = bootstrap([3.0])
    assert estimate == Estimate(3.0, -math.inf, math.inf, 1)
    assert estimate.to_json() == {"value": 3.0, "low": None, "high": None, "n": 1}
    assert Estimate.from_json(estimate.to_json()) == estimate


@pytest.mark.parametrize(("point", "excluded"), [(0.0, True), (0.5, False), (1.0, False), (1.01, True)])
def test_excludes_counts_the_ends_as_inside(point: float, excluded: bool) -> None:
    assert Estimate(0.7, 0.5, 1.0, 9).excludes(point) is excluded


def test_bootstrap_of_the_mean_agrees_with_the_normal_interval() -> None:
    # Mean of n values of spread s: the interval's half width is 1.96 s / sqrt(n), within the noise of resampling.
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert estimate.n == 400


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    trials = [proportion(rng.random(150) < 0.3, seed=i, resamples=300) for i in range(200)]
    covered = sum(not trial.excludes(0.3) for trial in trials)
    assert 180 <= covered <= 200  # 95 % of 200 is 190, three standard errors are 9


def test_same_seed_same_interval_whatever_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(100)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)
    whole = bootstrap(values, seed=4)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 100 * 7)
    assert bootstrap(values, seed=4) == whole


def test_counting_few_values_gives_the_intervals_of_drawing_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    hits, clusters = (rng.random(300) < 0.2).astype(float), rng.integers(0, 80, 300)
    counted = bootstrap(hits), bootstrap(hits, clusters=clusters)
    monkeypatch.setattr(statistics, "FEW_VALUES", 0)
    drawn = bootstrap(hits), bootstrap(hits, clusters=clusters)
    for one, other in zip(counted, drawn, strict=True):
        assert (one.value, one.n) == (other.value, other.n)
        # The ends of an interval from 2000 resamples vary by about a tenth of its half width.
        slack = 0.1 * (other.high - other.low)
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=slack)


def test_unanimous_hits_get_the_exact_binomial_bound() -> None:
    # Clopper-Pearson for 10 of 10: 0.025 ** (1 / 10) = 0.6915.
    all_hit, none_hit = proportion(np.ones(10)), proportion(np.zeros(10))
    assert (all_hit.value, all_hit.high, none_hit.value, none_hit.low) == (1.0, 1.0, 0.0, 0.0)
    assert all_hit.low == pytest.approx(0.6915, abs=1e-4)
    assert none_hit.high == pytest.approx(1 - 0.6915, abs=1e-4)
    assert proportion([0.5]) == Estimate(0.5, 0.0, 1.0, 1)


def test_clusters_widen_the_interval_of_values_that_repeat_each_other() -> None:
    # Five equal captions per image carry the information of one: the interval is that of the 60 images.
    hits = np.random.default_rng(6).random(60) < 0.5
    repeated = np.repeat(hits, 5)
    clustered = proportion(repeated, clusters=np.repeat(np.arange(60), 5))
    single = proportion(hits)
    assert clustered.n == 60
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.1)
    assert clustered.high - clustered.low > 1.8 * (proportion(repeated).high - proportion(repeated).low)


def test_a_weighted_mean_is_a_ratio_of_sums_by_hand() -> None:
    # 1 error in 4 words and 0 in 12: accuracies 0.75 and 1, of all words (3 + 12) / 16. Two drawn of two: both the first
    # (one time in four) 0.75, both the second 1.
    estimate = bootstrap([0.75, 1.0], weights=[4, 12])
    assert estimate == Estimate(15 / 16, 0.75, 1.0, 2)
    assert bootstrap([0.75, 1.0]).value == 0.875
    # Every recording with two errors in four words more: the paired difference is -2 / 4 of the words, whoever is drawn.
    same = paired_difference([0.75, 1.0], [0.25, 0.5], weights=[4, 12])
    assert (same.value, same.low, same.high) == (-0.5, -0.5, -0.5)
    # A loss of 1 in the first alone: -4 of 16 words; of the first alone all, of the second none.
    lost = paired_difference([1.0, 1.0], [0.0, 1.0], weights=[4, 12])
    assert (lost.value, lost.low, lost.high, lost.n) == (-0.25, -1.0, 0.0, 2)


def test_the_interval_of_a_ratio_agrees_with_the_delta_method() -> None:
    # Var(sum x / sum w) = mean of (x - R w)^2 / (n mean(w)^2), Cochran 1977, section 2.11.
    rng = np.random.default_rng(12)
    weights = rng.integers(1, 40, 600)
    values = 1 - rng.binomial(weights, 0.15) / weights
    ratio = (weights * values).sum() / weights.sum()
    half = 1.96 * np.sqrt(np.mean((weights * (values - ratio)) ** 2) / 600) / weights.mean()
    estimate = bootstrap(values, weights=weights)
    assert estimate.value == pytest.approx(ratio)
    assert (estimate.low, estimate.high) == pytest.approx((ratio - half, ratio + half), abs=0.15 * half)


def test_equal_weights_are_no_weights() -> None:
    values = np.random.default_rng(13).random(50)
    weighted, plain = bootstrap(values, weights=np.full(50, 8.0)), bootstrap(values)
    assert (weighted.value, weighted.low, weighted.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_pairing_sees_a_small_shift_that_unpaired_intervals_cannot() -> None:
    before = np.random.default_rng(7).normal(0, 10, 100)
    after = before - 1 + np.random.default_rng(8).normal(0, 0.5, 100)
    difference = paired_difference(before, after)
    assert difference.excludes(0)
    assert difference.value == pytest.approx(-1, abs=0.2)
    assert not bootstrap(after).excludes(before.mean())


def test_percentiles_of_0_to_100_are_themselves() -> None:
    assert percentiles(np.arange(101.0)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([4.0], shares=(99.9,)) == {"p99.9": 4.0}


def test_ratio_of_medians_says_how_much_faster_the_second_is() -> None:
    ratio = ratio_of_medians([8.0, 9.0, 7.0] * 10, [2.0, 2.0, 2.0] * 10)
    assert ratio.value == 4.0
    assert ratio.low <= 4.0 <= ratio.high
    assert ratio.n == 30


def test_interleaving_cancels_the_drift_of_the_machine() -> None:
    drift = np.linspace(1, 3, 200)
    slow, fast = 2 * drift, drift
    together = ratio_of_medians(slow, fast)
    assert (together.low, together.high) == pytest.approx((2.0, 2.0))
    apart = ratio_of_medians(slow, fast[:-1])
    assert apart.high - apart.low > 0.1


def test_blocks_widen_the_interval_of_a_series_whose_neighbours_resemble_each_other() -> None:
    steps = np.random.default_rng(9).normal(0, 0.05, 300).cumsum() + 5
    flat = np.ones(301)
    blocks, alone = ratio_of_medians(steps, flat, block=25), ratio_of_medians(steps, flat, block=1)
    assert blocks.high - blocks.low > 2 * (alone.high - alone.low)


def test_a_block_is_a_run_of_neighbours() -> None:
    # One block as long as the series is a rotation of it: the same values, so the same median every time.
    series = np.random.default_rng(11).uniform(1, 2, 40)
    ratio = ratio_of_medians(series, np.ones(40), block=40)
    assert (ratio.low, ratio.high) == (ratio.value, ratio.value)
    # Pairs of neighbours that average to 1.5 have one median, which single draws would not.
    swings = ratio_of_medians(np.tile([1.0, 2.0], 50), np.ones(100), block=2)
    assert (swings.low, swings.high) == (1.5, 1.5)


def test_a_single_pair_of_latencies_proves_nothing() -> None:
    assert ratio_of_medians([4.0], [2.0]) == Estimate(2.0, -math.inf, math.inf, 1)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap([])
    with pytest.raises(ValueError, match="100 and 99"):
        paired_difference(np.ones(100), np.ones(99))
    with pytest.raises(ValueError, match="positive"):
        ratio_of_medians([1.0, 0.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="mean only"):
        bootstrap([1.0, 2.0], np.median, clusters=[0, 1])
    with pytest.raises(ValueError, match="clusters of shape"):
        bootstrap([1.0, 2.0], clusters=[0])
    with pytest.raises(ValueError, match="mean only"):
        bootstrap([1.0, 2.0], np.median, weights=[1, 1])
    with pytest.raises(ValueError, match="weights of shape"):
        bootstrap([1.0, 2.0], weights=[1])
    with pytest.raises(ValueError, match="weight 0 of value 1 is not positive"):
        bootstrap([1.0, 2.0], weights=[1, 0])


def test_one_block_as_long_as_the_data_only_rotates_it() -> None:
    found = bootstrap([1.0, 5.0, 9.0], np.median, block=3)
    assert (found.value, found.low, found.high) == (5.0, 5.0, 5.0)
