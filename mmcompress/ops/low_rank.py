"""Two thin factors in place of one matrix: W (out, in) ~ up (out, k) @ down (k, in), fitted to what the matrix is given.

Let y = W x and M = E[x x'] over calibration tokens. All methods take the left singular vectors U of W R for some root R (in, in),
keep k of them, and make up for the rest as well as these allow: ``up = U_k``, ``down = U_k' W``. They differ in R:

- *svd*: R = I. The nearest matrix of rank k (Eckart and Young 1936); knows nothing of the inputs.
- *asvd*: R = diag(E|x|^alpha) (ASVD: Yuan et al. 2023, arXiv 2312.05821, section 3.2): channels of large inputs count more.
- *svd-llm*: R R' = M (SVD-LLM: Wang et al. 2024, arXiv 2403.07378, section 3.1). As ``|(W - up down) R|^2 = E|y - up down x|^2``,
  the error of the outputs is exactly the sum of the dropped squared singular values, and no rank-k matrix has less.

Difference from the papers, in form only: they write ``down = U_k' (W R) R^-1``, which is U_k' W; so nothing is inverted, and what a
direction costs can be told in one currency for all of them: dropping direction i adds ``down_i M down_i'`` to the squared error.

Outputs may count differently, too: with G = E[g g'] of gradients g at the outputs, ``g . dy`` is what an error dy changes, and
``tr(G dW M dW')`` its mean square where g and x are independent (K-FAC: Martens and Grosse 2015, arXiv 1503.05671, section 3.1;
as a metric for truncation: generalized Fisher-weighted SVD, arXiv 2505.17974). With G = H H' it is H' W R that is decomposed.

Shape alphabet: r = min(out, in) directions, k of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Directions:
    """A matrix as a sum of r rank-one parts, the most important first: W = up @ down."""

    up: Tensor
    """(out, r)."""
    down: Tensor
    """(r, in)."""
    losses: Tensor
    """(r,): what the squared error of the outputs grows by when a part is dropped."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up (out, k) and down (k, in), scaled such that column i of the one is as long as row i of the other.

        Neither then holds all of the scale, which is what rounding to few bits and weight decay look at.
        """
        up, down = self.up[:, :rank], self.down[:rank]
        lengths = up.norm(dim=0), down.norm(dim=1)
        scale = torch.where((lengths[0] > 0) & (lengths[1] > 0), (lengths[1] / lengths[0]).sqrt(), 1.0)
        return up * scale, down / scale[:, None]


def root_of(moment: Tensor) -> Tensor:
    """Return a lower triangular root of a second moment (C, C): Cholesky's, of the moment and a billionth of the identity.

    A covariance that is small beside the mean it was told from may have negative eigenvalues, from rounding; those go first.
    """
    lifted = moment.double().clone()
    least = 1e-9 * (abs(float(lifted.diagonal().mean())) or 1.0)
    lifted.diagonal().add_(least)
    root, failed = torch.linalg.cholesky_ex(lifted)
    if failed:
        values, vectors = torch.linalg.eigh(lifted)
        root = torch.linalg.qr((vectors * values.clamp_min(least).sqrt()).T, mode="r").R.T
    return root


def directions(
    weight: Tensor, root: Tensor | None = None, moment: Tensor | None = None, outputs: Tensor | None = None
) -> Directions:
    """Return the directions of W (out, in), those first that `root` (in, in), or its diagonal (in,), makes largest.

    They are priced by `moment` (in, in), by default that of white inputs; `outputs` (out, out) is a root of G. Computes in float64.
    """
    matrix = weight.double()
    weighed = matrix if outputs is None else outputs.double().T @ matrix
    seen = weighed if root is None else weighed * root.double() if root.dim() == 1 else weighed @ root.double()
    return _along(_left_vectors(seen), weighed, moment, outputs)


def random_directions(
    weight: Tensor, generator: torch.Generator, moment: Tensor | None = None, outputs: Tensor | None = None
) -> Directions:
    """Return directions drawn uniformly among those of all outputs of W (out, in): the control every choice has to beat.

    What is kept is still fitted as well as those allow, and priced as in `directions`.
    """
    matrix = weight.double()
    weighed = matrix if outputs is None else outputs.double().T @ matrix
    basis = torch.linalg.qr(weighed).Q if weight.shape[0] > weight.shape[1] else None
    width = min(weight.shape)
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64).to(weight.device)
    turned = torch.linalg.qr(drawn).Q
    return _along(turned if basis is None else basis @ turned, weighed, moment, outputs)


def _left_vectors(matrix: Tensor) -> Tensor:
    """Return the left singular vectors (out, r) of a matrix (out, in), by way of a square one: three times as fast."""
    if matrix.shape[0] > matrix.shape[1]:
        basis, square = torch.linalg.qr(matrix)
        return basis @ torch.linalg.svd(square).U
    return torch.linalg.svd(torch.linalg.qr(matrix.T, mode="r").R.T).U


def _along(left: Tensor, weighed: Tensor, moment: Tensor | None, outputs: Tensor | None) -> Directions:
    """Return the directions `left` (out, r), orthonormal, of the matrix `weighed` (out, in) by a root of G."""
    down = left.T @ weighed
    losses = (down.square() if moment is None else (down @ moment.double()) * down).sum(1).clamp_min(0)
    up = left if outputs is None else torch.linalg.solve_triangular(outputs.double().T, left, upper=True)
    return Directions(up, down, losses)


def largest_paying_rank(shape: tuple[int, int], multiple: int) -> int:
    """Return the largest rank, in multiples, at which two factors have fewer numbers than the matrix (out, in); else 0."""
    return (shape[0] * shape[1] - 1) // sum(shape) // multiple * multiple
