"""AWQ, activation-aware weight quantization: input channels with large inputs have their weights rounded more finely.

    s_c = mean|x_c|^alpha,  divided by sqrt(max s * min s)        W x  ->  round(W * s) (x / s)

Nothing changes before rounding. Then a channel's error shrinks by its s, as long as the grid is set by other weights (Lin et al.
2023, arXiv 2306.00978, section 3.2 and equation 4). alpha is searched over 0, 0.05 … 0.95 for the least squared error of the
output; 0 is rounding as it was, so the best is never worse on the samples it was searched on.

With the second moment H = E[x x'] of the inputs, the error of rounding row w to q is (w - q) H (w - q)': exact, and no input has to
be kept. Layers that read one input share one s, chosen by the sum of their errors.

Deliberate difference: channels more than four orders of magnitude below the largest count as that, since calibration may just not
have met them.

Shape alphabet: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STRENGTHS = tuple(step / 20 for step in range(20))
FLOOR = 1e-4


def channel_scales(mean_sizes: Tensor, strength: float) -> Tensor:
    """Return s (C,) of channels whose inputs have the mean absolute values `mean_sizes` (C,)."""
    sizes = mean_sizes.float()
    sizes = sizes.clamp_min(float(sizes.max()) * FLOOR).clamp_min(torch.finfo(torch.float32).tiny)
    # Of the largest, so that no power leaves the range of float32.
    scales = (sizes / sizes.max()) ** strength
    return scales / (scales.max() * scales.min()).sqrt()


def best_strength(
    weights: Sequence[Tensor], mean_sizes: Tensor, moment: Tensor, rounded: Callable[[Tensor], Tensor]
) -> float:
    """Return the alpha with the least error over all `weights` (R, C), of equal ones the smallest.

    `rounded` gives the floats that a scaled weight is rounded to; `moment` is H (C, C).
    """
    best, least = 0.0, float("inf")
    for strength in STRENGTHS:
        scales = channel_scales(mean_sizes, strength)
        error = 0.0
        for weight in weights:
            # In place: what is compared is as large as the weight, and the search goes through it twenty times.
            difference = rounded(weight.float() * scales).div_(scales).sub_(weight)
            error += float((difference @ moment).mul_(difference).sum(dtype=torch.float64))
        if error < least:
            best, least = strength, error
    return best
