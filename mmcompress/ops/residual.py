"""Make the residual stream of a pre-norm transformer narrower: project it on a few orthonormal directions, and fit what reads it.

Let x be a state (C,), n(x) = x / sqrt(mean(x^2) + eps) its RMS norm, and Q (C, K) the K directions that stay, Q'Q = I.

- What writes into the stream writes Q' times as much: rows of a table E become E Q, a Linear's weight Q' W, its bias Q' b.
- RMS norms commute with rotations, so with K = C what reads them may read Q'n(x) instead: W diag(g) becomes W diag(g) Q, the
  gain g being gone from the norm, and all outputs stay as they are (computational invariance).
- With K < C the Linear that reads Q'n(x) comes closest to W diag(g) n(x), on the tokens that were seen, with

      W diag(g) S Q (Q'S Q)^-1,      S = E[n(x) n(x)']

- The norm now divides what is left of x by the root of its mean square over K channels, so that its outputs have a mean square
  of 1. Those of Q'n(x) have e C / K, where e = tr Q'S Q / tr S is the share of energy that stays: the norm's gain becomes
  sqrt(e C / K). Its eps stays what config.json says; states are not so small that it matters.

Source: SliceGPT (Ashkboos et al. 2024), sections 3.1 to 3.3. Deliberate differences: one Q for the whole tower, the leading
eigenvectors of the sum of S over all norms, so that no product (K, K) is needed between blocks; SliceGPT has one for each block.
Readers are fitted; there they are W diag(g) Q, and norms take the mean over C channels, e being 1.

Shape alphabet: C channels, K channels left, V rows of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading(second: Tensor, width: int) -> Tensor:
    """Return the `width` directions (C, K) with most of a second moment (C, C), first the largest; float64."""
    vectors = torch.linalg.eigh(second.double()).eigenvectors.flip(1)[:, :width]
    # Eigenvectors have no sign of their own: the largest entry is positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def largest_channels(second: Tensor, width: int) -> Tensor:
    """Return the `width` channels with most of a second moment (C, C), as directions (C, K) in the channels' order; float64."""
    kept = second.diagonal().argsort(descending=True, stable=True)[:width].sort().values
    return torch.eye(len(second), dtype=torch.float64, device=second.device)[:, kept]


def random_directions(channels: int, width: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal directions (C, K), drawn uniformly: the control every choice has to beat; float64."""
    drawn = torch.randn(channels, width, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(drawn)
    return basis * triangle.diagonal().sign()


def kept_energy(second: Tensor, basis: Tensor) -> float:
    """Return the share of a second moment (C, C) that lies in the directions `basis` (C, K)."""
    moment = second.double()
    return float(((moment @ basis) * basis).sum() / moment.diagonal().sum())


def norm_scale(second: Tensor, basis: Tensor) -> float:
    """Return what the norm of K channels gives out has to be multiplied by: sqrt(e C / K)."""
    return (kept_energy(second, basis) * basis.shape[0] / basis.shape[1]) ** 0.5


def written(rows: Tensor, basis: Tensor) -> Tensor:
    """Return what is written into the narrow stream in place of `rows` (…, C): (…, K)."""
    return (rows.double() @ basis).to(rows.dtype)


def reader(weight: Tensor, gain: Tensor, second: Tensor, basis: Tensor) -> Tensor:
    """Return the weight (out, K) that reads the narrow stream's norm in place of `weight` (out, C) with `gain` (C,); float64."""
    moment, wanted = second.double(), weight.double() * gain.double()
    seen = moment @ basis
    inner = basis.T @ seen
    # A direction in which nothing lies is read as nothing; what is added is less than what float32 moments are wrong by.
    inner.diagonal().add_(1e-9 * float(inner.diagonal().mean()))
    return torch.linalg.solve(inner, seen.T @ wanted.T).T


def mixing(table: Tensor, wanted: Tensor) -> Tensor:
    """Return the M (K, K) before an output layer that is also the word table (V, K), with table M closest to `wanted` (V, K).

    The table cannot take on the last norm's gain, which in the directions Q is Q' diag(g) Q: no vector of gains.
    """
    rows = table.double()
    return torch.linalg.solve(rows.T @ rows, rows.T @ wanted.double())
