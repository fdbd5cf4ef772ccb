"""How much a unit (attention head, MLP neuron, block) matters. Tensors in, one score per unit out; larger means keep.

A *group* is everything that has to be cut together with a unit: the rows of the Linears that write it and the columns of the
Linear that reads it. Units are contiguous and equally wide in every matrix, so a matrix with U units is viewed as (U, width, …).

Sources and deliberate differences:

- Magnitude: L2 norm of the whole group (Li et al. 2017 for filters; rows, their biases and columns here).
- Wanda (Sun et al. 2023, section 3): ``|W_ij| * ||X_j||``. Wanda compares single weights inside an output row; a group is
  scored by the L2 norm over its reader columns, which is the root of the output energy it would carry if channels were
  independent. With norms taken around the mean this is the fluctuation metric of FLAP (An et al. 2023), right when the mean is
  folded into a bias afterwards.
- Taylor (Molchanov et al. 2019; heads: Michel et al. 2019): the first-order effect of a gate xi on the unit's activation,
  ``dL/dxi = sum x * dL/dx``, which equals ``sum w * dL/dw`` over the reader's columns. The sum over a unit's channels and tokens
  is taken before the square (the effect of removing all of it; squaring first would ignore how channels cancel), the square per
  sample, and the mean over samples after it, so that opposite samples do not cancel.
- Block influence (ShortGPT, Men et al. 2024): ``1 - E cos(x_in, x_out)``.

Shape alphabet: B batch, N tokens, C channels, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wanda(weight: Tensor, input_norms: Tensor) -> Tensor:
    """Return ``|W| * ||X||`` per weight: weight (out, in), input_norms (in,) -> (out, in)."""
    return weight.abs() * input_norms


def group_activation(reader: Tensor, input_norms: Tensor, units: int) -> Tensor:
    """Return the Wanda norm of every unit: reader (out, U*width), input_norms (U*width,) -> (U,)."""
    per_column = wanda(reader.float(), input_norms.float()).square().sum(0)
    return per_column.view(units, -1).sum(1).sqrt()


def group_magnitude(rows: Sequence[Tensor], columns: Sequence[Tensor], units: int) -> Tensor:
    """Return the L2 norm of every unit's group -> (U,).

    rows: weights (U*width, in) and biases (U*width,) of the writers; columns: weights (out, U*width) of the readers. Widths may
    differ between matrices (a key-value group has more query than key rows), never within one.
    """
    total = torch.zeros(units, dtype=torch.float32, device=columns[0].device)
    for matrix in rows:
        total += matrix.float().square().reshape(units, -1).sum(1)
    for matrix in columns:
        total += matrix.float().square().sum(0).view(units, -1).sum(1)
    return total.sqrt()


def gate_gradients(activations: Tensor, gradients: Tensor, units: int) -> Tensor:
    """Return ``sum x * dL/dx`` per sample and unit: two (B, …, U*width) -> (B, U); signed, the sum comes first."""
    effect = (activations.float() * gradients.float()).unflatten(-1, (units, -1))
    return effect.flatten(1, -3).sum((1, 3)) if effect.dim() > 3 else effect.sum(-1)


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """Return ``1 - cos`` of each token's state before and after a block, averaged: two (…, C) -> ()."""
    return (1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)).mean()


def head_relevance(weights: Tensor, gradients: Tensor) -> Tensor:
    """Return the mean of ``relu(dA * A)`` of every head over samples, queries and keys: two (B, H, N, S) -> (H,)."""
    return (weights.float() * gradients.float()).relu().mean((0, 2, 3))


def non_decreasing(values: Tensor) -> Tensor:
    """Return the nearest sequence that never falls (isotonic regression, equal neighbours pooled): (U,) -> (U,).

    Of the increments of a curve, those of its lower convex hull.
    """
    pools: list[tuple[float, int]] = []  # mean, count
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return torch.cat([values.new_full((count,), mean) for mean, count in pools])


def by_norm(scores: Tensor) -> Tensor:
    """Return scores divided by their root mean square; all zero stays zero."""
    size = scores.square().mean().sqrt()
    return scores / size if size > 0 else scores


def relative(scores: Tensor) -> Tensor:
    """Return scores divided by their mean, so that layers of different scale compare; all zero stays zero."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores
