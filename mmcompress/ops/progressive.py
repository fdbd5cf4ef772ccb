"""Progressive pruning: how far it has come at each step, and how units of several kinds compare.

UPop (Shi et al. 2023, arXiv 2301.13741, section 3) prunes a growing share of the budget while the model trains: after step t of T

    p_t = p * sqrt((1 - cos(pi (t+1) / T)) / 2) = p * sin(pi (t+1) / (2 T))

so that most goes early, when it can still come back, and little at the end. What is chosen at p_t is not cut at once: its gates are
set to 1 - p_t / p, so they reach 0 just when the whole share is chosen, and no cliff is left between the masked and the cut model.

Gradients of gates of heads and of neurons differ in scale; they compare after each kind's are standardised over all layers and
towers (section 3, unified pruning).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def progress(step: int, steps: int) -> float:
    """Return p_t / p after step `step` (from 0) of `steps`; 1 after the last."""
    return math.sin(math.pi * min(step + 1, steps) / (2 * steps))


def standardised(scores: Sequence[Tensor], kinds: Sequence[str]) -> list[Tensor]:
    """Return scores less their kind's mean, divided by its standard deviation, in float64; zeros where all are equal.

    scores: (U,) each; kinds: one for each tensor.
    """
    made = []
    for kind in kinds:
        values = torch.cat([score.double() for score, own in zip(scores, kinds, strict=True) if own == kind])
        made.append((values.mean(), values.std(correction=0)))
    return [
        (score.double() - mean) / spread if spread > 0 else torch.zeros_like(score, dtype=torch.float64)
        for score, (mean, spread) in zip(scores, made, strict=True)
    ]
