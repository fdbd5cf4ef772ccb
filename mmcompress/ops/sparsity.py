"""Sparsity: which weights of a matrix become 0, and how those that stay make up for them.

Two patterns, both row by row (a row makes one output, and rows do not share an error):

- unstructured: the same number of zeros in every row (Wanda compares weights within a row; section 3 there)
- N:M: of every M neighbouring inputs at most N are read (Zhou et al. 2021, arXiv 2102.04010), 2:4 being what tensor cores know

A score says how much a weight matters, and the lowest go:

- magnitude: |w|
- Wanda (Sun et al. 2023, arXiv 2306.11695): |w_ij| * ||x_j||; see `ops.importance`
- SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, sections 3.2 and 3.3): what the row's output loses when w_j goes and the
  columns behind it make up for it. With H = E[x x'] and U the upper Cholesky factor of its inverse (see `ops.gptq`):

      score_j = w_j^2 / U_jj^2        w_k <- w_k - w_j * U_jk / U_jj        for k > j

  Columns go from left to right. What goes is chosen for a block of 128 columns (N:M: for M columns) when it is reached, from the
  weights as they have become by then.

Deliberate differences from SparseGPT's code: within a block every row gives up as many weights, there a block's rows share their
zeros; a column whose input was always 0 goes first but counts as one of the zeros that were asked for, there it is emptied besides.

Shape alphabet: R rows (outputs), C columns (inputs), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.ops.gptq import BLOCK, Compensation


@dataclass(frozen=True)
class Pattern:
    """How many weights go, and where: `sparsity` of every row, or all but `kept` of each `of` neighbours where `of` is not 0."""

    sparsity: float
    kept: int = 0
    of: int = 0

    @classmethod
    def grouped(cls, kept: int, of: int) -> Pattern:
        """Return the pattern kept:of."""
        return cls(1 - kept / of, kept, of)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}" if self.of else "unstructured"

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns can be cut into whole groups."""
        return not self.of or columns % self.of == 0

    def zeros(self, columns: int) -> int:
        """Return how many of the first `columns` weights of a row go."""
        return columns // self.of * (self.of - self.kept) if self.of else round(self.sparsity * columns)

    def lowest(self, scores: Tensor) -> Tensor:
        """Return which of the weights with these scores (R, C) go: (R, C) bool. Of equal ones the leftmost."""
        if not self.of:
            return _lowest(scores, self.zeros(scores.shape[1]))
        groups = scores.unflatten(1, (-1, self.of))
        return _lowest(groups, self.of - self.kept).flatten(1)

    def holds(self, weight: Tensor) -> bool:
        """Whether `weight` (R, C) has at least the zeros that it should, in every row or group."""
        zero = weight == 0
        if self.of:
            return bool((zero.unflatten(1, (-1, self.of)).sum(-1) >= self.of - self.kept).all())
        return bool((zero.sum(1) >= self.zeros(weight.shape[1])).all())


def sparsegpt(
    weight: Tensor, how: Compensation, silent: Tensor, pattern: Pattern, scores: Tensor | None = None
) -> Tensor:
    """Return `weight` (R, C) with zeros, and with what stays changed so that the output changes least; float32.

    how: of the inputs' second moment, in the columns' own order; silent: (C,), columns whose input was always 0; scores: (R, C)
    to choose by in the place of SparseGPT's own.
    """
    left = weight.detach().float().clone()
    columns = left.shape[1]
    factor, own = how.factor, how.factor.diagonal()

    def chosen(start: int, stop: int) -> Tensor:
        given = (left[:, start:stop] / own[start:stop]).square() if scores is None else scores[:, start:stop]
        given = torch.where(silent[start:stop], torch.zeros_like(given), given)
        if pattern.of:
            return pattern.lowest(given)
        return _lowest(given, pattern.zeros(stop) - pattern.zeros(start))

    size = BLOCK - BLOCK % max(1, pattern.of)
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        errors = left.new_empty(len(left), stop - start)
        gone = torch.empty_like(errors, dtype=torch.bool)
        for column in range(start, stop):
            place = column - start
            if place % (pattern.of or size) == 0:
                end = min(column + (pattern.of or size), stop)
                gone[:, place : place + end - column] = chosen(column, end)
            error = (left[:, column] * gone[:, place]) / factor[column, column]
            left[:, column].masked_fill_(gone[:, place], 0)
            left[:, column + 1 : stop].addr_(error, factor[column, column + 1 : stop], alpha=-1)
            errors[:, place] = error
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return left


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Return which of the scores (…, C) are the `count` lowest: (…, C) bool. Ties go to the left."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)
