"""Repair a Linear that lost input channels, from second-order statistics of its inputs. No training, closed form.

Let y = W x + b, K the kept and R the removed channels, m the mean and S the covariance of x over calibration tokens. Dropping
R alone leaves the error W_R x_R. Three levels:

- *bias*: add ``W_R m_R`` to b. The error becomes ``W_R (x_R - m_R)``; never larger on the calibration tokens.
- *least squares*: also change the kept columns by ``D = W_R S_RK (S_KK + r I)^-1``, the best linear guess of the removed
  channels from the kept ones, with ``b += W_R m_R - D m_K``. The ridge r pulls D (not the weights) to 0, so a large r gives
  *bias*, and D = 0 being allowed means the calibration error is never larger than that of *bias*.

With few tokens for many channels (short texts) S is mostly noise, and D would fit it. So S is first shrunk towards a multiple
of the identity by the share that is best for that many Gaussian tokens (OAS: Chen, Wiesel, Eldar and Hero 2010, eq. 23), which
needs no held-out data; with many tokens the share goes to 0. Shrinking keeps the guarantee above: it adds a multiple of
|W_R|^2 + |D|^2 to what is minimised.

Without a bias to write to, S and m are replaced by the uncentred second moment and 0.

Source: the normal equations; used for one-shot structured pruning by e.g. ZipLM (Kurtic et al. 2023) and, as mean folding, by
FLAP (An et al. 2023). Difference: one solve for all removed channels together, with ridge and shrinkage, which
also make float32 precise enough. The dtype of the moments is used throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of x over `count` effective tokens: `mean` (C,), `second` (C, C) = E[x x'] or None where only means are known."""

    mean: Tensor
    second: Tensor | None = None
    count: float = 0


def shrinkage(covariance: Tensor, count: float) -> float:
    """Return the share of a scaled identity to mix into a covariance (C, C) of `count` tokens: OAS, in 0..1."""
    channels = covariance.shape[0]
    trace = float(covariance.diagonal().sum(dtype=torch.float64))
    squares = float(torch.linalg.vector_norm(covariance, dtype=torch.float64)) ** 2
    spread = (count + 1 - 2 / channels) * (squares - trace**2 / channels)
    # A multiple of the identity already: any share gives the same.
    return min(1.0, ((1 - 2 / channels) * squares + trace**2) / spread) if spread > 0 else 1.0


def conditioned(moments: Moments, centred: bool, ridge: float) -> Tensor:
    """Return the covariance (C, C), or the second moment, that `repair` works with: shrunk, and with the ridge.

    It can be inverted: its ridge is a millionth at least, more than what float32 moments are wrong by. `moments.second` is
    overwritten.
    """
    assert moments.second is not None, "only means are known"
    covariance = moments.second
    if centred:
        covariance = covariance.addr_(moments.mean, moments.mean, alpha=-1)
    share = shrinkage(covariance, moments.count)
    scale = float(covariance.diagonal().mean()) or 1.0
    covariance = covariance.mul_(1 - share)
    covariance.diagonal().add_((share + max(ridge, 1e-6)) * scale)
    return covariance


def repair(
    weight: Tensor, bias: Tensor | None, kept: Tensor, moments: Moments, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Return the weight (out, K) and bias (out,) of the Linear that reads only the `kept` input channels.

    weight: (out, C), bias: (out,) or None, kept: (K,) ascending. With `moments.second` None only the bias is changed. `ridge` is
    relative to the channels' mean variance. The result has the dtype of `weight`. `moments.second` is overwritten: with many
    channels it is the largest thing in memory here.
    """
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    gone = removed.nonzero().squeeze(1)
    mean = moments.mean if bias is not None else torch.zeros_like(moments.mean)
    full = weight.to(mean.dtype)
    new_weight, shift = full[:, kept], full[:, gone] @ mean[gone]
    if moments.second is not None and len(gone) and len(kept):
        covariance = moments.second.addr_(mean, mean, alpha=-1)
        share = shrinkage(covariance, moments.count)
        scale = float(covariance.diagonal().mean())
        inner = covariance[kept[:, None], kept].mul_(1 - share)
        cross = covariance[kept[:, None], gone].mul_(1 - share)
        if scale > 0:
            inner.diagonal().add_((share + ridge + 1e-12) * scale)
            change = torch.linalg.solve(inner, cross @ full[:, gone].T).T
            new_weight, shift = new_weight + change, shift - change @ mean[kept]
    new_bias = None if bias is None else (bias + shift).to(bias.dtype)
    return new_weight.to(weight.dtype), new_bias
