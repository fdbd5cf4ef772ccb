"""Ranges of activations, watched over a stream of batches in bounded memory.

Every observer gives the same answer whatever the order of the batches and however they are cut. `MinMax` keeps two numbers.
`Histogram` counts values in bins of equal width over -2^e..2^e; when a value falls outside, e grows and each pair of bins
becomes one, and because a pair's edges are edges of the finer grid, that equals having counted in the wider bins at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from mmcompress.ops.rounding import Levels, dequantize, quantize, scale_from_range

Method = Literal["min-max", "percentile", "mse", "entropy"]
BINS = 1 << 14
SHRINKS = torch.linspace(1.0, 0.4, 61)
"""The shares of the full range that a `Cut` tries."""


class MinMax:
    """Covers every value seen."""

    def __init__(self) -> None:
        self.lowest = math.inf
        self.highest = -math.inf

    def watch(self, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach().float())
        self.lowest, self.highest = min(self.lowest, low.item()), max(self.highest, high.item())

    def range(self) -> tuple[float, float]:
        """Return the range with 0 in it: padding and masked values are exactly 0 and must stay so."""
        if not (math.isfinite(self.lowest) and math.isfinite(self.highest)):
            raise ValueError(f"activations span {self.lowest}..{self.highest}: nothing seen, or not finite")
        return min(self.lowest, 0.0), max(self.highest, 0.0)

    def scale(self, levels: Levels) -> tuple[Tensor, Tensor]:
        lowest, highest = self.range()
        return scale_from_range(torch.tensor(lowest), torch.tensor(highest), levels)


class ChannelRange:
    """Lowest and highest value of every channel, the last dimension: (C,) each."""

    def __init__(self) -> None:
        self.lowest = self.highest = torch.tensor(0.0)
        self.seen = False

    def watch(self, x: Tensor) -> None:
        low, high = torch.aminmax(x.detach().float().flatten(0, -2), dim=0)
        self.lowest = torch.minimum(self.lowest, low) if self.seen else low
        self.highest = torch.maximum(self.highest, high) if self.seen else high
        self.seen = True

    def largest(self) -> Tensor:
        """Return max |x| per channel (C,)."""
        return torch.maximum(self.lowest.abs(), self.highest.abs())


class Histogram(MinMax):
    """Counts values, so that rare outliers can be cut off; subclasses say where."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent: int | None = None
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def watch(self, x: Tensor) -> None:
        super().watch(x)
        largest = max(abs(self.lowest), abs(self.highest))
        if not math.isfinite(largest):
            raise ValueError(f"activations span {self.lowest}..{self.highest}: not finite")
        # frexp gives the smallest power of two above `largest`, which therefore falls inside the last bin.
        needed = math.frexp(max(largest, 2.0**-60))[1]
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            self._widen()
        values = x.detach().float().flatten()
        bins = torch.ldexp(values, torch.tensor(BINS.bit_length() - 2 - self.exponent)).floor_().to(torch.int64)
        self.counts += torch.bincount(bins.add_(BINS // 2), minlength=BINS).cpu()

    def _widen(self) -> None:
        assert self.exponent is not None
        self.exponent += 1
        merged = self.counts.reshape(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged

    def edges(self) -> Tensor:
        """Return the (BINS + 1,) edges of the bins, float64."""
        assert self.exponent is not None
        return (
            torch.ldexp(torch.arange(-BINS // 2, BINS // 2 + 1, dtype=torch.float64), torch.tensor(self.exponent + 1))
            / BINS
        )


class Percentile(Histogram):
    """Leaves (100 - percentile) / 2 percent of the values out at either end."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        lowest, highest = super().range()
        total = self.counts.cumsum(0)
        out = int(total[-1]) * (1 - self.percentile / 100) / 2
        edges = self.edges()
        # The lowest bin that does not lie wholly among the values left out; its lower edge, or what was really seen there.
        first = int(torch.searchsorted(total, math.floor(out), right=True))
        last = int(torch.searchsorted(total, int(total[-1]) - math.floor(out)))
        return max(lowest, min(edges[first].item(), 0.0)), min(highest, max(edges[last + 1].item(), 0.0))


class Cut(Histogram, ABC):
    """Cuts both ends to where a loss is least that subclasses know.

    The upper end is searched with the lower one fixed, then the lower one, then both again: one-sided activations (GELU)
    need only one of them cut.
    """

    def scale(self, levels: Levels) -> tuple[Tensor, Tensor]:
        lowest, highest = super().range()
        seen = self.counts > 0
        edges = self.edges()
        centres = ((edges[:-1] + edges[1:]) / 2)[seen].float().clamp(lowest, highest)
        counts = self.counts[seen].double()
        low_share = high_share = 1.0
        for _ in range(2):
            ends = torch.tensor(lowest) * low_share, torch.tensor(highest) * SHRINKS
            high_share = self._best(centres, counts, levels, *ends)
            ends = torch.tensor(lowest) * SHRINKS, torch.tensor(highest) * high_share
            low_share = self._best(centres, counts, levels, *ends)
        return scale_from_range(torch.tensor(lowest * low_share), torch.tensor(highest * high_share), levels)

    def _best(self, centres: Tensor, counts: Tensor, levels: Levels, low: Tensor, high: Tensor) -> float:
        scale, zero_point = scale_from_range(low.expand_as(SHRINKS), high.expand_as(SHRINKS), levels)
        values = centres.expand(len(SHRINKS), -1)
        codes = quantize(values, scale, zero_point, levels, axis=0)
        inside = (values >= low.view(-1, 1)) & (values <= high.view(-1, 1))
        rounded = dequantize(codes, scale, zero_point, axis=0)
        return SHRINKS[self.losses(values, counts, codes.long() - levels.low, rounded, inside).argmin()].item()

    @abstractmethod
    def losses(self, values: Tensor, counts: Tensor, codes: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        """Return the loss (S,) of S ranges.

        Of the bins that anything fell into: `values` (S, K) their centres, `counts` (K,); of each range `codes` (S, K) from 0,
        what those stand for, `rounded`, and which bins lie `inside` it.
        """


class LeastError(Cut):
    """Cuts where the expected squared error of rounding and clipping together is least."""

    def losses(self, values: Tensor, counts: Tensor, codes: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        return (rounded - values).double().square() @ counts


class LeastDivergence(Cut):
    """Cuts where what is left of the distribution tells most of it: the least Kullback-Leibler divergence.

    As in TensorRT's calibration (Migacz, "8-bit inference with TensorRT", GTC 2017): P is the histogram with what lies outside put
    into the outermost bins inside, Q spreads what fell on each level evenly over the bins on it that anything fell into.
    """

    def losses(self, values: Tensor, counts: Tensor, codes: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        own = torch.where(inside, counts, 0.0)
        # A bin's number among those inside: bins are in order, so what lies outside goes to the first or the last of them.
        first, last = inside.double().argmax(1), inside.shape[1] - 1 - inside.flip(1).double().argmax(1)
        places = torch.arange(len(counts)).expand_as(codes).clamp(first[:, None], last[:, None])
        reference = torch.zeros_like(own).scatter_add_(1, places, counts.expand_as(own))
        levels = torch.zeros(len(own), int(codes.max()) + 1, dtype=own.dtype)
        total = levels.scatter_add(1, codes, own).gather(1, codes)
        spread = torch.where(inside, total / levels.scatter_add(1, codes, inside.double()).gather(1, codes), 0.0)
        p, q = (each / each.sum(1, keepdim=True) for each in (reference, spread))
        # Each bin inside gives its level something: q is 0 only where p is.
        divergence = torch.where(inside, p * (p / q).log(), 0.0).sum(1)
        return torch.where(inside.any(1), divergence, torch.inf)


def observer(method: Method, percentile: float) -> MinMax:
    """Return a fresh observer."""
    if method == "percentile":
        return Percentile(percentile)
    return {"min-max": MinMax, "mse": LeastError, "entropy": LeastDivergence}[method]()
