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

A LayerNorm is an RMS norm of x less its mean, times g, plus b. Where all that reads the stream are LayerNorms, what is written may
lose its mean, and b goes into the readers' biases as W b. What is left stays a LayerNorm: Q = U V', U (C, K - 1) the directions
that stay among those without a mean, and V (K, K - 1) orthonormal and without a mean too. So Q'x has no mean to lose, and one of
the K channels holds nothing: Q'Q = I - 11'/K. Readers with a bias are fitted around the mean m of n(x), S being the covariance,
and their bias makes up for the mean of what is cut:

      W' = W diag(g) S Q (Q'S Q)^-1,      W b + W diag(g) m - W' Q'm

Source: SliceGPT (Ashkboos et al. 2024), sections 3.1 to 3.3. Deliberate differences: one Q for the whole tower, the leading
eigenvectors of the sum of S over all norms, so that no product (K, K) is needed between blocks; SliceGPT has one for each block.
Readers are fitted; there they are W diag(g) Q, and norms take the mean over C channels, e being 1. There LayerNorms become RMS
norms; here they stay, as runtimes have kernels for them, at the price of that one channel.

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


def told(second: Tensor, read: Tensor, width: int) -> Tensor:
    """Return the `width` orthonormal directions (C, K) that tell most of what is read of a second moment S (C, C); float64.

    `read` is the sum of W'W (C, C) over readers W (out, C), which count as they are scaled. Of all directions these leave the least
    error in readers fitted to them (reduced-rank regression): S^-1/2 times the leading eigenvectors of S^1/2 W'W S^1/2.
    """
    values, vectors = torch.linalg.eigh(second.double())
    # Directions in which nothing lies tell nothing, whatever is read of them.
    root = values.clamp_min(1e-9 * float(values[-1])).sqrt()
    half, inverse = vectors * root @ vectors.T, vectors / root @ vectors.T
    return torch.linalg.qr(inverse @ leading(half @ read.double() @ half, width)).Q


def largest_channels(second: Tensor, width: int) -> Tensor:
    """Return the `width` channels with most of a second moment (C, C), as directions (C, K) in the channels' order; float64."""
    kept = second.diagonal().argsort(descending=True, stable=True)[:width].sort().values
    return torch.eye(len(second), dtype=torch.float64, device=second.device)[:, kept]


def random_directions(channels: int, width: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal directions (C, K), drawn uniformly: the control every choice has to beat; float64."""
    drawn = torch.randn(channels, width, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(drawn)
    return basis * triangle.diagonal().sign()


def without_mean(channels: int) -> Tensor:
    """Return orthonormal directions (C, C - 1) that are all there is without a mean (Helmert's); float64."""
    place = torch.arange(1, channels, dtype=torch.float64)
    rows = torch.arange(channels, dtype=torch.float64)[:, None]
    raised = torch.where(rows < place, 1.0, torch.where(rows == place, -place, 0.0))
    return raised / (place * (place + 1)).sqrt()


def kept_energy(second: Tensor, basis: Tensor) -> float:
    """Return the share of a second moment (C, C) that lies in the directions `basis` (C, K)."""
    moment = second.double()
    return float(((moment @ basis) * basis).sum() / moment.diagonal().sum())


def norm_scale(second: Tensor | None, basis: Tensor) -> float:
    """Return what the norm of K channels gives out has to be multiplied by: sqrt(e C / K), 1 where nothing is cut."""
    if second is None:
        return 1.0
    return (kept_energy(second, basis) * basis.shape[0] / basis.shape[1]) ** 0.5


def written(rows: Tensor, basis: Tensor) -> Tensor:
    """Return what is written into the narrow stream in place of `rows` (…, C): (…, K)."""
    return (rows.double() @ basis).to(rows.dtype)


def reader(weight: Tensor, gain: Tensor, second: Tensor | None, basis: Tensor) -> Tensor:
    """Return the weight (out, K) that reads the narrow stream's norm in place of `weight` (out, C) with `gain` (C,); float64.

    Without a second moment nothing is cut: K = C.
    """
    wanted = weight.double() * gain.double()
    if second is None:
        return wanted @ basis
    moment = second.double()
    seen = moment @ basis
    inner = basis.T @ seen
    # A direction in which nothing lies is read as nothing; what is added is less than what float32 moments are wrong by.
    inner.diagonal().add_(1e-9 * float(inner.diagonal().mean()))
    return torch.linalg.solve(inner, seen.T @ wanted.T).T


def shift(weight: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None, basis: Tensor, made: Tensor) -> Tensor:
    """Return what a reader's own bias needs beside `made` (out, K) in place of `weight` (out, C): (out,), float64.

    `gain` and `bias` (C,) are the LayerNorm's, `mean` (C,) is that of what it gives out before these; None where nothing is cut.
    """
    wide = weight.double()
    if mean is None:
        return wide @ bias.double()
    middle = mean.double()
    return wide @ (bias.double() + gain.double() * middle) - made.double() @ (basis.T @ middle)


def mixing(table: Tensor, wanted: Tensor) -> Tensor:
    """Return the M (K, K) before an output layer that is also the word table (V, K), with table M closest to `wanted` (V, K).

    The table cannot take on the last norm's gain, which in the directions Q is Q' diag(g) Q: no vector of gains.
    """
    rows = table.double()
    return torch.linalg.solve(rows.T @ rows, rows.T @ wanted.double())
