"""Observers: any order and any batches give the same range; what is cut off is what was asked for."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops.observers import (
    BINS,
    SHRINKS,
    ChannelRange,
    Histogram,
    LeastDivergence,
    LeastError,
    Method,
    MinMax,
    Percentile,
    observer,
)
from mmcompress.ops.rounding import INT8, UINT8, Levels, dequantize, quantize


def values(count: int = 20_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)) * 2 + 0.3


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("levels", [UINT8, INT8])
def test_order_and_batching_do_not_matter(method: Method, levels: object) -> None:
    x = torch.cat([values(), torch.tensor([300.0, -7.0])])
    orders = [[x], list(x.flip(0).split(777)), list(x[torch.randperm(len(x))].split(5000))]
    found = []
    for parts in orders:
        watcher = observer(method, 99.9)
        for part in parts:
            watcher.watch(part)
        found.append(watcher.scale(levels))  # type: ignore[arg-type]
    assert all(torch.equal(scale, found[0][0]) and torch.equal(zero, found[0][1]) for scale, zero in found)


def test_growing_bins_equal_counting_in_wide_bins() -> None:
    x = values()
    grown, wide = Histogram(), Histogram()
    grown.watch(x)
    grown.watch(torch.tensor([1000.0]))
    wide.watch(torch.tensor([1000.0]))
    wide.watch(x)
    assert grown.exponent == wide.exponent == 10
    assert torch.equal(grown.counts, wide.counts)
    assert int(grown.counts.sum()) == len(x) + 1


def test_bins_hold_what_their_edges_say() -> None:
    watcher = Histogram()
    watcher.watch(torch.tensor([-4.0, -0.001, 0.0, 3.999]))
    edges = watcher.edges()
    assert edges[0] == -8
    assert edges[-1] == 8
    hit = watcher.counts.nonzero().flatten()
    for value, index in zip([-4.0, -0.001, 0.0, 3.999], hit.tolist(), strict=True):
        assert edges[index] <= value < edges[index + 1]


def test_min_max_is_the_range_with_zero_in_it() -> None:
    watcher = MinMax()
    watcher.watch(torch.tensor([[2.0, 5.0], [3.0, 4.0]]))
    assert watcher.range() == (0.0, 5.0)


def test_percentile_cuts_the_share_asked_for() -> None:
    watcher = Percentile(90.0)
    watcher.watch(torch.linspace(-1, 1, 100_001))
    low, high = watcher.range()
    assert low == pytest.approx(-0.9, abs=4 / BINS)
    assert high == pytest.approx(0.9, abs=4 / BINS)


def test_percentile_of_everything_is_min_max() -> None:
    x = values()
    every, ends = Percentile(100.0), MinMax()
    every.watch(x)
    ends.watch(x)
    assert every.range() == ends.range()


def test_least_error_beats_min_max_with_an_outlier() -> None:
    x = torch.cat([values(), torch.tensor([60.0])])

    def error(watcher: MinMax) -> float:
        watcher.watch(x)
        scale, zero = watcher.scale(UINT8)
        return (dequantize(quantize(x, scale, zero, UINT8), scale, zero) - x).square().mean().item()

    assert error(LeastError()) < error(MinMax())


def divergence(x: torch.Tensor, high: float, levels: int) -> float:
    """By hand: of values a whole number apart from 0 on, but for the largest, cut above `high`, on so many levels."""
    counts = torch.bincount(x.long()).double()
    values = torch.arange(float(len(counts)))
    values[-1] = x.max()
    inside = values <= high
    reference = counts * inside
    reference[inside.nonzero()[-1]] += counts[~inside].sum()
    level = (values / (high / (levels - 1))).round().long()
    spread = torch.zeros_like(counts)
    for each in range(levels):
        own = (level == each) & inside
        spread[own] = counts[own].sum() / own.sum()
    p, q = reference / reference.sum(), spread / spread.sum()
    return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True) if a > 0)


def test_least_divergence_is_what_the_formula_gives() -> None:
    """Golden: whole numbers, the larger the rarer; of the shares that are tried, none of which ends in a bin, on four levels."""
    x = torch.arange(41.0).repeat_interleave((400 / (1 + torch.arange(41.0)) ** 2).ceil().long())
    x = torch.cat([x, torch.tensor([41.7])])
    found: list[torch.Tensor] = []

    class Noting(LeastDivergence):
        def losses(self, *given: torch.Tensor) -> torch.Tensor:
            found.append(super().losses(*given))
            return found[-1]

    watcher = Noting()
    watcher.watch(x)
    scale, _ = watcher.scale(Levels(0, 3, torch.uint8, symmetric=False))
    wanted = torch.tensor([divergence(x, 41.7 * share, 4) for share in SHRINKS.tolist()])
    torch.testing.assert_close(found[0].float(), wanted, rtol=1e-5, atol=1e-6)
    assert scale.item() == pytest.approx(41.7 * SHRINKS[wanted.argmin()].item() / 3, rel=1e-5)


def test_least_divergence_covers_everything_where_nothing_is_rare_and_one_value_where_there_is_no_other() -> None:
    even, one = LeastDivergence(), LeastDivergence()
    even.watch(torch.arange(256.0))
    assert even.scale(UINT8)[0].item() == pytest.approx(1.0)
    one.watch(torch.tensor([5.0, 5.0]))
    assert one.scale(UINT8)[0].item() == pytest.approx(5 / 255, rel=1e-3)


def test_channel_ranges() -> None:
    watcher = ChannelRange()
    watcher.watch(torch.tensor([[[1.0, -3.0], [2.0, 0.5]]]))
    watcher.watch(torch.tensor([[-4.0, 1.0]]))
    assert watcher.lowest.tolist() == [-4, -3]
    assert watcher.highest.tolist() == [2, 1]
    assert watcher.largest().tolist() == [4, 3]


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse", "entropy"])
def test_nothing_seen_and_not_finite_are_errors(method: Method) -> None:
    with pytest.raises(ValueError, match="nothing seen, or not finite"):
        observer(method, 99.9).scale(INT8)
    watcher = observer(method, 99.9)
    with pytest.raises(ValueError, match="not finite"):  # noqa: PT012 (a histogram refuses at once, min-max when asked)
        watcher.watch(torch.tensor([1.0, torch.inf]))
        watcher.scale(INT8)
