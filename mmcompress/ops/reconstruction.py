"""Repair a Linear that lost input channels, from second-order statistics of its inputs. No training, closed form.

Let y = W x + b, K the kept and R the removed channels, m the mean and S the covariance of x over calibration tokens. Dropping
R alone leaves the error W_R x_R. Three levels:

- *bias*: add ``W_R m_R`` to b. The error becomes ``W_R (x_R - m_R)``; never larger on the calibration tokens.
- *least squares*: also change the kept columns by ``D = W_R S_RK (S_KK + r I)^-1``, the best linear guess of the removed
  channels from the kept ones, with ``b += W_R m_R - D m_K``. The ridge r pulls D (not the weights) to 0, so a large r gives
  *bias*, and D = 0 being allowed means the calibration error is never larger than that of *bias*.

Without a bias to write to, S and m are replaced by the uncentred second moment and 0.

Source: the normal equations; used for one-shot structured pruning by e.g. ZipLM (Kurtic et al. 2023) and, as mean folding, by
FLAP (An et al. 2023). Difference: one solve for all removed channels together, in float64, with the ridge on the change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of x over T tokens: `mean` (C,), `second` (C, C) = E[x x'], or None where only means are known."""

    mean: Tensor
    second: Tensor | None = None


def repair(
    weight: Tensor, bias: Tensor | None, kept: Tensor, moments: Moments, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Return the weight (out, K) and bias (out,) of the Linear that reads only the `kept` input channels.

    weight: (out, C), bias: (out,) or None, kept: (K,) ascending. With `moments.second` None only the bias is changed. `ridge` is
    relative to the mean variance of the kept channels. The result has the dtype of `weight`.
    """
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    gone = removed.nonzero().squeeze(1)
    full = weight.double()
    mean = moments.mean.double() if bias is not None else torch.zeros_like(moments.mean, dtype=torch.float64)
    new_weight, shift = full[:, kept], full[:, gone] @ mean[gone]
    if moments.second is not None and len(gone) and len(kept):
        rows = moments.second[kept].double() - mean[kept, None] * mean
        inner, cross = rows[:, kept], rows[:, gone]
        scale = inner.diagonal().mean()
        if scale > 0:
            inner.diagonal().add_(ridge * scale + 1e-12 * scale)
            change = torch.linalg.solve(inner, cross @ full[:, gone].T).T
            new_weight, shift = new_weight + change, shift - change @ mean[kept]
    new_bias = None if bias is None else (bias.double() + shift).to(bias.dtype)
    return new_weight.to(weight.dtype), new_bias
