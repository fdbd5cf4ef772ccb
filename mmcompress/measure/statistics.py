"""Numbers with their uncertainty: a value, a 95 % interval and the number of samples behind it.

Intervals are percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13): resample the samples with
replacement, recompute the statistic, keep the middle 95 % of the results. Latencies follow each other in time and
their noise is autocorrelated, so rounds are resampled in circular blocks of neighbours (Politis and Romano 1992);
treating them as independent would give intervals that are too narrow.

What a bootstrap cannot know: with one sample the interval is unbounded, and where all
samples agree (20 right out of 20) the interval has no width although the truth may lie elsewhere. `n` is always
shown so that a reader can judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmcompress.errors import UsageError
from mmcompress.ops.statistics import Estimate

__all__ = [
    "Estimate",
    "bootstrap",
    "paired_difference",
    "percentiles",
    "ratio_of_medians",
    "samples_needed",
    "usual_block",
]

CONFIDENCE = 0.95
RESAMPLES = 2000
_CHUNK_VALUES = 4_000_000  # resampled values held at once: 32 MB of float64


class Statistic(Protocol):
    """A numpy reduction such as ``np.mean`` or ``np.median``."""

    def __call__(self, values: NDArray[np.float64], /, *, axis: int) -> Any: ...


def bootstrap(
    values: ArrayLike, statistic: Statistic = np.mean, seed: int = 0, resamples: int = RESAMPLES, block: int = 1
) -> Estimate:
    """Estimate a statistic of `values: (n,)`; `block` > 1 resamples runs of neighbours.

    Raises UsageError where there is no value or one is not finite.
    """
    data = _samples(values, "values")
    centre = float(statistic(data, axis=-1))
    if len(data) == 1:
        return Estimate(centre, -math.inf, math.inf, 1)
    return _interval(
        centre, [statistic(data[index], axis=-1) for index in _resampled(len(data), seed, resamples, block)], len(data)
    )


def paired_difference(before: ArrayLike, after: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of ``after - before`` over the same n samples; pairing removes the spread between easy and hard samples.

    `before`, `after`: (n,), sample i of both measured on the same input. Raises UsageError where the lengths differ.
    """
    first, second = _pair(before, after)
    return bootstrap(second - first, np.mean, seed, resamples)


def ratio_of_medians(
    a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, block: int | None = None
) -> Estimate:
    """``median(a) / median(b)`` of two times taken in the same rounds: above 1 when `b` is the faster one.

    `a`, `b`: (n,) positive, element i measured in round i. Whole rounds are resampled, in circular blocks of `block`
    rounds (default n^(1/3), the usual rate for dependent data), so a disturbance that hit both sides stays with both.
    Raises UsageError where the lengths differ or a time is not positive.
    """
    first, second = _pair(a, b)
    if min(first.min(), second.min()) <= 0:
        raise UsageError(
            f"a time of {min(first.min(), second.min())} is not positive", hint="time more repeats in each round"
        )
    n = len(first)
    centre = float(np.median(first) / np.median(second))
    if n == 1:
        return Estimate(centre, -math.inf, math.inf, 1)
    draws = _resampled(n, seed, resamples, usual_block(n) if block is None else block)
    return _interval(
        centre, [np.median(first[index], axis=-1) / np.median(second[index], axis=-1) for index in draws], n
    )


def usual_block(n: int) -> int:
    """Block length for `n` samples in time order: n^(1/3), at least 1."""
    return max(1, round(n ** (1 / 3)))


def percentiles(values: ArrayLike, ranks: Sequence[float] = (50, 90, 99)) -> dict[float, float]:
    """Percentiles of `values: (n,)` by linear interpolation between the two nearest samples, keyed by rank (0..100)."""
    data = _samples(values, "values")
    return {rank: float(found) for rank, found in zip(ranks, np.percentile(data, ranks), strict=True)}


def samples_needed(rank: float) -> int:
    """Samples a percentile needs so that at least one is expected beyond it: 10 for p90, 100 for p99."""
    return math.ceil(round(100 / (100 - rank), 6))


def _resampled(n: int, seed: int, resamples: int, block: int) -> list[NDArray[np.int64]]:
    """Index arrays (r, n) that together hold `resamples` rows of circular blocks; drawn in chunks to bound memory."""
    if resamples < 1 or block < 1:
        raise UsageError(f"resamples={resamples} and block={block} must be at least 1", hint="the default is 2000")
    generator = np.random.default_rng(seed)
    block = min(block, n)
    rows = max(1, _CHUNK_VALUES // n)
    chunks = []
    for done in range(0, resamples, rows):
        count = min(rows, resamples - done)
        starts = generator.integers(0, n, size=(count, math.ceil(n / block)))
        index = (starts[:, :, None] + np.arange(block)) % n  # (r, blocks, block)
        chunks.append(index.reshape(count, -1)[:, :n])
    return chunks


def _interval(centre: float, drawn: list[Any], n: int) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate([np.atleast_1d(part) for part in drawn]), [tail, 100 - tail])
    return Estimate(centre, float(low), float(high), n)


def _samples(values: ArrayLike, name: str) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise UsageError(f"{name} has shape {data.shape}, expected (n,) with n >= 1", hint="give one number per sample")
    if not np.isfinite(data).all():
        raise UsageError(
            f"{name} holds {int((~np.isfinite(data)).sum())} of {data.size} samples that are not finite",
            hint="the model returned nan or infinity; look at its outputs first",
        )
    return data


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _samples(a, "the first side"), _samples(b, "the second side")
    if len(first) != len(second):
        raise UsageError(
            f"{len(first)} and {len(second)} samples cannot be paired", hint="measure both sides on the same samples"
        )
    return first, second
