"""GPTQ: rounding one column of a weight after the other, each error made up for by the columns still to come.

With the second moment H = E[x x'] of a layer's inputs, rounding row w to q costs  (w - q) H (w - q)'  in its output. Columns are
rounded in order; what column j was moved by is taken from the later ones so that the output changes least (Frantar et al. 2022,
arXiv 2210.17323, equations 2 to 4 and algorithm 1):

    U = upper Cholesky factor of inverse(H + damping * mean(diagonal H) * I)
    q_j = nearest(w_j)        w_k <- w_k - (w_j - q_j) * U_jk / U_jj        for k > j

Columns with the largest inputs go first (the paper's "act-order"), while there are others left to make up for them. The grids are
those of neighbouring columns and fixed beforehand, so nothing has to be permuted when the layer runs. Updates of columns beyond a
block of 128 wait until the block is done.

Deliberate differences: a weight that is 0 stays 0, whatever it should make up for, so that a sparse layer stays sparse (as in
SparseGPT, arXiv 2301.00774, section 3.4); a column whose input was always 0 is rounded to nearest and not to 0, since calibration
may just not have met it; and the factor is computed in float64, with ten times the damping where that is still not enough.

Shape alphabet: R rows (outputs), C columns (inputs), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.ops.grouped import Grouped
from mmcompress.ops.rounding import UINT4, Levels

DAMPING = 0.01
BLOCK = 128


@dataclass(frozen=True)
class Compensation:
    """Which column to round when, (C,), and how the later ones make up for it: U (C, C) in that order."""

    order: Tensor
    factor: Tensor


def compensation(moment: Tensor, damping: float = DAMPING, order: Tensor | None = None) -> Compensation:
    """Return how columns make up for each other, for inputs of second moment `moment` (C, C); once for all layers they go to.

    `order` (C,) by default begins with the largest inputs.
    """
    if order is None:
        order = moment.diagonal().argsort(descending=True, stable=True)
    return Compensation(order, _factor(moment, order, damping))


def gptq(weight: Tensor, how: Compensation, scale: Tensor, zero_point: Tensor, levels: Levels = UINT4) -> Grouped:
    """Round `weight` (R, C) to the grids (R, G) so that the output changes least."""
    order, factor, columns = how.order, how.factor, weight.shape[1]
    left = weight.detach().float()[:, order]  # a copy: rounded and made up for in place
    group = (order // (columns // scale.shape[1])).tolist()
    steps, zeros = scale.float().unbind(1), zero_point.float().unbind(1)
    codes = torch.empty_like(left)
    empty = left == 0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = left.new_empty(len(left), stop - start)
        for column in range(start, stop):
            step, zero = steps[group[column]], zeros[group[column]]
            code = (left[:, column] / step).round_().add_(zero).clamp_(levels.low, levels.high)
            code = torch.where(empty[:, column], zero, code)
            codes[:, column] = code
            error = (left[:, column] - (code - zero) * step) / factor[column, column]
            left[:, column + 1 : stop].addr_(error, factor[column, column + 1 : stop], alpha=-1)
            errors[:, column - start] = error
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return Grouped(codes[:, order.argsort()].to(levels.dtype), scale, zero_point)


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> Tensor:
    """Return (w - q) H (w - q)' of each row: (R,)."""
    difference = weight.double() - rounded.double()
    return ((difference @ moment.double()) * difference).sum(1)


def _factor(moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return U (C, C), upper triangular, with U'U the inverse of the damped moment, its columns in `order`.

    With J the reversal of columns and  J H J = M M'  (M lower triangular),  U = J inverse(M) J: the inverse of H itself is never
    made, which took eight times as long in LAPACK's potri.
    """
    last_first = order.flip(0)
    diagonal = moment.diagonal().double()[last_first]
    silent = diagonal <= 0
    unit = diagonal.mean() if not bool(silent.all()) else torch.ones((), dtype=diagonal.dtype)
    for _ in range(8):
        damped = moment[last_first][:, last_first].double()
        damped.diagonal().add_(damping * unit).add_(silent * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each of these takes gigabytes where a layer has many inputs
        if not failed:
            # Transposed, as LAPACK wants its columns, so that it is overwritten.
            unit_matrix = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).T
            torch.linalg.solve_triangular(lower, unit_matrix, upper=False, out=unit_matrix)
            del lower
            inverse = unit_matrix.float()
            if bool(inverse.isfinite().all()):
                return inverse.flip(0, 1)
        damping = max(10 * damping, DAMPING)
    raise AssertionError("a second moment that no damping makes positive definite is none")
