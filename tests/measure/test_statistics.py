"""Golden values worked out by hand, and the law an interval has to keep: it covers the truth as often as it says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mmcompress.errors import UsageError
from mmcompress.measure.statistics import (
    Estimate,
    bootstrap,
    paired_difference,
    percentiles,
    ratio_of_medians,
    samples_needed,
)


def test_estimate_prints_value_interval_and_n() -> None:
    assert str(Estimate(0.4312, 0.4119, 0.45, 956)) == "0.431 [0.412, 0.450] n=956"


def test_estimate_survives_json_with_an_unknown_interval() -> None:
    for found in (Estimate(0.5, 0.25, 0.75, 8), bootstrap([0.5]), ratio_of_medians([2.0], [1.0])):
        assert Estimate.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert not bootstrap([0.5]).excludes(7.0)


def test_there_is_one_kind_of_estimate_in_the_package() -> None:
    from mmcompress.ops import statistics

    assert type(bootstrap([1.0, 2.0])) is statistics.Estimate


def test_bootstrap_of_two_values_has_the_three_means_worked_out_by_hand() -> None:
    # The four equally likely resamples of (0, 1) have means 0, .5, .5, 1: the 2.5 % and 97.5 % points are 0 and 1.
    assert bootstrap([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)


def test_bootstrap_of_a_proportion_matches_the_binomial_quantiles() -> None:
    # 40 right of 100: the resampled count is Binomial(100, .4); its 2.5 % and 97.5 % quantiles are 31 and 50.
    found = bootstrap([1.0] * 40 + [0.0] * 60, resamples=20_000)
    assert found.value == 0.4
    assert abs(found.low - 0.31) <= 0.01
    assert abs(found.high - 0.50) <= 0.01


def test_one_block_as_long_as_the_data_only_rotates_it() -> None:
    # A circular block of all n samples is a rotation: the mean never changes, so the interval has no width.
    found = bootstrap([1.0, 2.0, 6.0], block=3)
    assert found.value == pytest.approx(3.0)
    assert found.high - found.low == pytest.approx(0.0)


def test_chunked_resampling_keeps_the_number_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcompress.measure import statistics

    monkeypatch.setattr(statistics, "_CHUNK_VALUES", 50)
    chunks = statistics._resampled(20, seed=0, resamples=7, block=3)
    assert [chunk.shape for chunk in chunks] == [(2, 20), (2, 20), (2, 20), (1, 20)]


def test_same_seed_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(5).normal(size=60)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_paired_difference_is_after_minus_before_and_narrower_than_unpaired() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(scale=10, size=200)
    after = before + 0.5 + generator.normal(scale=0.1, size=200)
    paired = paired_difference(before, after)
    assert paired.value == pytest.approx(float(np.mean(after) - np.mean(before)))
    assert paired.low > 0.4
    unpaired = bootstrap(after)
    assert (paired.high - paired.low) * 20 < unpaired.high - unpaired.low


def test_ratio_of_medians_golden() -> None:
    # medians 4 and 2: b is twice as fast; identical rounds on each side leave no doubt.
    assert ratio_of_medians([4.0] * 9, [2.0] * 9) == Estimate(2.0, 2.0, 2.0, 9)
    assert ratio_of_medians([3.0, 4.0, 8.0], [1.0, 2.0, 16.0]).value == 2.0


def test_a_disturbance_that_hits_both_sides_cancels() -> None:
    slow_down = np.repeat([1.0, 3.0, 1.0, 3.0], 10)
    found = ratio_of_medians(2 * slow_down, slow_down)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_bad_samples_are_refused_with_a_reason() -> None:
    with pytest.raises(UsageError, match=r"shape \(0,\)"):
        bootstrap([])
    with pytest.raises(UsageError, match="1 of 2 samples that are not finite"):
        bootstrap([1.0, math.nan])
    with pytest.raises(UsageError, match="2 and 3 samples"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(UsageError, match="not positive"):
        ratio_of_medians([1.0, 0.0], [1.0, 1.0])
    with pytest.raises(UsageError, match="at least 1"):
        bootstrap([1.0, 2.0], resamples=0)


def test_percentiles_interpolate_linearly() -> None:
    # ranks of 11 evenly spaced samples fall on the samples themselves; p95 lies half-way between 9 and 10.
    assert percentiles(range(11), (0, 50, 90, 95, 100)) == {0: 0.0, 50: 5.0, 90: 9.0, 95: 9.5, 100: 10.0}


def test_samples_needed_for_a_percentile() -> None:
    assert [samples_needed(rank) for rank in (50, 90, 99, 99.9)] == [2, 10, 100, 1000]


def _binomial_bounds(trials: int, chance: float, deviations: float = 4.0) -> tuple[float, float]:
    spread = deviations * math.sqrt(chance * (1 - chance) / trials)
    return chance - spread, chance + spread


def test_coverage_of_the_mean_is_what_is_claimed() -> None:
    trials = 400
    generator = np.random.default_rng(7)
    hits = sum(
        not bootstrap(generator.normal(3.0, 2.0, size=100), seed=i, resamples=500).excludes(3.0) for i in range(trials)
    )
    low, high = _binomial_bounds(trials, 0.94)  # the percentile interval is a little short at n=100 (about 0.94)
    assert low <= hits / trials <= high


def test_coverage_of_the_ratio_needs_blocks_when_the_noise_is_autocorrelated() -> None:
    trials, n = 200, 120
    generator = np.random.default_rng(11)

    def slow_noise() -> np.ndarray:
        shocks = generator.normal(scale=0.05, size=n)
        wave = np.empty(n)
        wave[0] = shocks[0] / math.sqrt(1 - 0.6**2)
        for i in range(1, n):
            wave[i] = 0.6 * wave[i - 1] + shocks[i]
        return np.exp(wave)

    covered = {"blocks": 0, "independent": 0}
    for trial in range(trials):
        a, b = 2 * slow_noise(), slow_noise()
        covered["blocks"] += not ratio_of_medians(a, b, seed=trial, resamples=300).excludes(2.0)
        covered["independent"] += not ratio_of_medians(a, b, seed=trial, resamples=300, block=1).excludes(2.0)
    assert covered["blocks"] / trials >= _binomial_bounds(trials, 0.90)[0]
    assert covered["blocks"] > covered["independent"] + 0.03 * trials
