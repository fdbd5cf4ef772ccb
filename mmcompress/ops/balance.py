"""How much tokens of each modality count when weights are rounded to calibration samples (MBQ, Li et al. 2024, arXiv 2412.19509).

A picture has hundreds of tokens and a question a dozen, so a plain mean over tokens is one over image tokens; and an error at an
image token moves the answer less than one at a text token. How much less is known of the gradient of the answers' loss:

    rho = mean|gradient| at image tokens / mean|gradient| at text tokens          of a part's output, per block
    rho <- max(rho, median of rho over the blocks)
    error = error at text tokens / T_text  +  rho * error at image tokens / T_image

Deliberate difference: errors are squared, as everywhere here, where the paper's are absolute; so they follow from second moments.

Shape alphabet: T tokens, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def floored_ratios(image: Tensor, text: Tensor) -> Tensor:
    """Return rho (L,) of the mean gradients (L,) at image and at text tokens; 1 where text has none to compare with."""
    ratios = torch.where(text > 0, image / text.clamp_min(torch.finfo(text.dtype).tiny), 1.0)
    return ratios.maximum(ratios.quantile(0.5))


def token_weights(ratio: float, image: int, text: int) -> tuple[float, float]:
    """Return how often an image and a text token count, where there are so many of each: once for ratio 1 and equal numbers.

    All count once where there are none of one kind.
    """
    if not image or not text:
        return 1.0, 1.0
    half = (image + text) / 2
    return ratio * half / image, half / text
