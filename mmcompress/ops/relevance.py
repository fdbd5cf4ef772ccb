"""How much each token had to do with an answer, followed back through attention maps and their gradients.

Source: Chefer, Gur and Wolf, "Generic Attention-model Explainability", ICCV 2021, arXiv 2103.15679, section 3. Of each attention
its weights A and their gradients dA of the answer's score make a map; maps are multiplied up in the order of the layers, beginning
with R = I for what a stream knows of itself and 0 for what it knows of another. Rows are the tokens that know, columns those known.

Deliberate difference: rows of a stream that has learned nothing yet, whose sum is 0, are left at I where the paper divides by 0.

Shapes: B batch, H heads, N tokens of a stream, S those it looks at (its own, or another stream's).
"""

from __future__ import annotations

import torch
from torch import Tensor


def looked(weights: Tensor, gradients: Tensor) -> Tensor:
    """Return the map (B, N, S) of one attention: the mean over heads of relu(dA * A). Both: (B, H, N, S)."""
    return (weights * gradients).relu().mean(dim=1)


def after_attention(relevance: Tensor, attended: Tensor) -> Tensor:
    """Return R + A R, what a stream (B, N, S) knows behind an attention among its own tokens; `attended`: (B, N, N)."""
    return relevance + attended @ relevance


def normalised(own: Tensor) -> Tensor:
    """Return a stream's relevance of itself (B, N, N) with what it learned, R - I, as shares that sum to 1 in each row, and I."""
    same = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    learned = own - same
    total = learned.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, learned / torch.where(total > 0, total, 1.0), 0.0) + same


def after_cross_attention(
    own: Tensor, other: Tensor, between: Tensor, back: Tensor, attended: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a stream knows of itself (B, N, N) and of another (B, N, S) once its tokens have attended to the other's.

    `own`: (B, N, N); `other`: (B, S, S), what the other knows of itself; `between`: (B, N, S), what this one knows of the other;
    `back`: (B, S, N), what the other knows of this one. `attended`: (B, N, S).
    """
    known = between + normalised(own).mT @ attended @ normalised(other)
    return own + attended @ back, known
