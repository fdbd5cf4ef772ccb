"""Numbers with their uncertainty: every measured value carries n and a 95 % interval.

Percentile bootstrap (Efron 1979) for samples that are independent, resampling whole clusters where several values
belong to one thing (the captions of an image), and drawing value and weight together where the mean is weighted: word
errors over words are a ratio of two sums, whose resampled denominator varies too. The circular block bootstrap (Politis
and Romano 1992) serves time series such as latencies, where neighbours resemble each other. Deliberate differences: one
sample gives an unbounded interval rather than a point, and hits that all agree get the exact binomial bound, because
resampling equal values would claim certainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
# Elements drawn at once: bounds memory (32 MB of indices) whatever the number of samples.
DRAWN_AT_ONCE = 4_000_000
FEW_VALUES = 64

Statistic = Callable[..., Any]
"""Called as statistic(values, axis=-1), such as numpy.mean and numpy.median."""


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval and the number of independent samples behind it."""

    value: float
    low: float
    high: float
    n: int

    def excludes(self, point: float) -> bool:
        """Whether the interval lies wholly on one side of `point`: the difference from it is more than noise."""
        return self.low > point or self.high < point

    def to_json(self) -> dict[str, float | int | None]:
        """Return {value, low, high, n}; what is unbounded or undefined is null, since JSON has no infinity."""
        bounded = {name: _finite(getattr(self, name)) for name in ("value", "low", "high")}
        return {**bounded, "n": self.n}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Estimate:
        """Return the estimate written by `to_json`. Raises KeyError when a field is missing."""
        value, low, high = (document[name] for name in ("value", "low", "high"))
        return cls(
            value=math.nan if value is None else float(value),
            low=-math.inf if low is None else float(low),
            high=math.inf if high is None else float(high),
            n=int(document["n"]),
        )

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"


def bootstrap(
    values: ArrayLike,
    statistic: Statistic = np.mean,
    seed: int = 0,
    resamples: int = RESAMPLES,
    clusters: ArrayLike | None = None,
    block: int = 1,
    weights: ArrayLike | None = None,
) -> Estimate:
    """Return `statistic` of `values` (n,) with its percentile bootstrap interval.

    Values in the order of time depend on their neighbours; with `block` > 1 circular blocks of that many are resampled.
    `clusters` (n,) names the independent thing each value belongs to; whole clusters are then resampled, the statistic
    is the mean, and the estimate's n counts clusters. With `weights` (n,), all positive, it is the weighted mean: the sum
    of weight times value, divided by the sum of weights, both of the samples drawn. Raises ValueError for no values, for a
    weight that is not positive, and for another statistic or blocks with clusters or weights.
    """
    sample = _sample(values)
    if clusters is not None or weights is not None:
        if statistic is not np.mean or block > 1:
            raise ValueError("a clustered or weighted bootstrap estimates the mean only, without blocks")
        return _mean(*_gathered(sample, clusters, weights), seed, resamples)
    if statistic is np.mean and block == 1:
        return _mean(sample, np.ones_like(sample), seed, resamples)
    value, n = float(statistic(sample, axis=-1)), len(sample)
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    rng = np.random.default_rng(seed)
    drawn = [statistic(sample[_blocks(n, block, count, rng)], axis=-1) for count in _portions(resamples, n)]
    return _estimate(value, np.concatenate(drawn), n)


def proportion(
    hits: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, clusters: ArrayLike | None = None
) -> Estimate:
    """Return the share of `hits` (n,), values in 0..1, with its bootstrap interval.

    Where all values are 0, or all are 1, resampling has nothing to vary: the two-sided exact binomial bound
    (Clopper and Pearson 1934) is given instead, e.g. [0.69, 1] for 10 hits out of 10.
    """
    sample = _sample(hits)
    found = bootstrap(sample, seed=seed, resamples=resamples, clusters=clusters)
    tail = ((1 - CONFIDENCE) / 2) ** (1 / found.n)
    if np.all(sample == 1):
        return Estimate(1.0, tail, 1.0, found.n)
    if np.all(sample == 0):
        return Estimate(0.0, 0.0, 1 - tail, found.n)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0), found.n)


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    statistic: Statistic = np.mean,
    seed: int = 0,
    resamples: int = RESAMPLES,
    clusters: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Estimate:
    """Return `statistic` of after - before, sample by sample, with its interval: negative means `after` is lower.

    Both are (n,) over the same samples in the same order, and so are their common `weights`. Raises ValueError when the
    lengths differ.
    """
    first, second = _sample(before), _sample(after)
    if len(first) != len(second):
        raise ValueError(f"paired samples differ in number: {len(first)} and {len(second)}")
    return bootstrap(second - first, statistic, seed, resamples, clusters, weights=weights)


def percentiles(values: ArrayLike, shares: Sequence[float] = (50, 90, 99)) -> dict[str, float]:
    """Return {"p50": …, "p90": …, "p99": …} of `values` (n,), linearly interpolated."""
    sample = _sample(values)
    return {f"p{share:g}": float(found) for share, found in zip(shares, np.percentile(sample, shares), strict=True)}


def ratio_of_medians(
    a: ArrayLike, b: ArrayLike, block: int | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return median(a) / median(b) with a block bootstrap interval: with latencies, how many times faster b is than a.

    `a` and `b` are in the order they were taken. When they are equally long they are taken as interleaved (a[i] beside
    b[i]) and the same blocks are drawn from both, so that drift of the machine cancels. `block` is the length of a
    block, by default the cube root of n. Raises ValueError for no values or for values that are not positive.
    """
    first, second = _sample(a), _sample(b)
    if min(first.min(), second.min()) <= 0:
        raise ValueError("a ratio of medians needs positive values")
    value, n = float(np.median(first) / np.median(second)), min(len(first), len(second))
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    rng = np.random.default_rng(seed)
    drawn = []
    for count in _portions(resamples, max(len(first), len(second))):
        rows_a = _blocks(len(first), block, count, rng)
        rows_b = rows_a if len(first) == len(second) else _blocks(len(second), block, count, rng)
        drawn.append(np.median(first[rows_a], axis=-1) / np.median(second[rows_b], axis=-1))
    return _estimate(value, np.concatenate(drawn), n)


def _sample(values: ArrayLike) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0:
        raise ValueError(f"expected a non-empty list of numbers, got shape {sample.shape}")
    return sample


def _portions(resamples: int, n: int) -> list[int]:
    at_once = max(1, DRAWN_AT_ONCE // n)
    return [min(at_once, resamples - done) for done in range(0, resamples, at_once)]


def _estimate(value: float, drawn: NDArray[np.float64], n: int) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return Estimate(value, float(low), float(high), n)


def _gathered(
    sample: NDArray[np.float64], clusters: ArrayLike | None, weights: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weighted sum and the total weight of each cluster; without `clusters` each value is its own."""
    labels = np.arange(len(sample)) if clusters is None else np.asarray(clusters)
    weight = np.ones_like(sample) if weights is None else np.asarray(weights, dtype=np.float64)
    for name, found in (("clusters", labels), ("weights", weight)):
        if found.shape != sample.shape:
            raise ValueError(f"{len(sample)} values but {name} of shape {found.shape}")
    if weight.min() <= 0:
        # A resample of nothing but such values would divide by zero.
        raise ValueError(f"weight {weight.min():g} of value {int(weight.argmin())} is not positive")
    _, which = np.unique(labels, return_inverse=True)
    sums = np.bincount(which, weights=weight * sample).astype(np.float64)
    return sums, np.bincount(which, weights=weight).astype(np.float64)


def _mean(sums: NDArray[np.float64], sizes: NDArray[np.float64], seed: int, resamples: int) -> Estimate:
    """The mean over n clusters given by their sums and sizes.

    Hits and their differences take few distinct values; how often each is drawn is then multinomial, which is the same
    distribution as drawing n indices and a hundred times cheaper.
    """
    value, n = float(sums.sum() / sizes.sum()), len(sums)
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    if len(distinct) <= FEW_VALUES:
        picked = rng.multinomial(n, counts / n, size=resamples)
        return _estimate(value, (picked @ distinct[:, 0]) / (picked @ distinct[:, 1]), n)
    drawn = []
    for count in _portions(resamples, n):
        rows = rng.integers(0, n, size=(count, n))
        drawn.append(sums[rows].sum(axis=-1) / sizes[rows].sum(axis=-1))
    return _estimate(value, np.concatenate(drawn), n)


def _blocks(n: int, block: int | None, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return indices (count, n): each row is consecutive runs of `block`, wrapping around the end."""
    length = min(n, block or max(1, round(n ** (1 / 3))))
    starts = rng.integers(0, n, size=(count, math.ceil(n / length), 1))
    rows = (starts + np.arange(length)) % n
    return rows.reshape(count, -1)[:, :n]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
