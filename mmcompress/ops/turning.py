"""Turn the channels of attention heads so that the last ones matter least; all of it leaves what a head computes as it is.

Floors keep every turn invertible: what never varies is treated as if it did by a millionth of the mean.

Shape alphabet: H heads, D head width, C channels the reader gives out.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6


def logit_turns(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (T, T^-1, T^-T), each (H, D, D): queries times T and keys times T^-T have the same products.

    queries: their second moments (H, D, D); keys: their covariances (H, D, D). Where queries and keys are drawn independently, no K
    directions keep more of the products' mean square than the first K turned ones: with the roots A and B of both moments, A B =
    U S V', queries become S^1/2 U' A^-1 q, keys S^-1/2 U' A k, which is S^1/2 V' B^-1 k.
    """
    root, back = roots(queries)
    left, sizes, _ = torch.linalg.svd(root @ roots(keys)[0])
    scale = sizes.clamp_min(FLOOR * sizes.mean(-1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)).sqrt()
    turn = scale[..., None] * (left.mT @ back)
    return turn, (root @ left) / scale[..., None, :], (left.mT @ root) / scale[..., None]


def value_turns(reader: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (T, T^-1), each (H, D, D): values times T, read by columns times T^-1, give the reader the same.

    reader: its columns W of each head (H, C, D); values: the covariances of what the head gives it (H, D, D). With the root R of
    that, W R = U S V', values become V' R^-1 v: uncorrelated, of variance 1, the i-th of which adds S_i^2 to the mean square.
    """
    root, back = roots(values)
    right = torch.linalg.eigh(root @ (reader.mT @ reader) @ root).eigenvectors.flip(-1)
    return right.mT @ back, root @ right


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square roots of moments (H, D, D) and their inverses."""
    values, vectors = torch.linalg.eigh((moments + moments.mT) / 2)
    floor = FLOOR * values.mean(-1, keepdim=True)
    sizes = values.clamp_min(floor.clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
    return (vectors * sizes[..., None, :]) @ vectors.mT, (vectors / sizes[..., None, :]) @ vectors.mT
