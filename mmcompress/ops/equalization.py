"""Cross-layer equalization: two Linears share out between them how large a channel is that goes from one to the other.

Where row i of a Linear makes the channel that column i of another one reads, and nothing but a multiple lies between, the row may
be multiplied by any g_i > 0 and the column divided by it. What is rounded on one grid loses least where its ranges are alike (Nagel
et al. 2019, arXiv 1906.04721, section 4.1): with r1 the largest |w| of the row, r2 of the column,

    s_i = sqrt(r1_i r2_i) / r2_i        row / s, column * s;  here  g = 1 / s = sqrt(r2_i / r1_i)

makes both sqrt(r1_i r2_i). A bias goes with its row and sets no range.

Deliberate differences: a channel of which either side is all zeros stays as it is, since any g does; and one round does, since no
Linear here is between two others that both share channels with it.

Shape alphabet: C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def equalizing_gains(made: Tensor, read: Tensor) -> Tensor:
    """Return g (C,) float32 that the makers' rows, of ranges `made` (C,), are multiplied by and the reader's columns divided."""
    made, read = made.float(), read.float()
    gains = read.sqrt() / made.sqrt()  # not of their ratio, which may leave the range of float32
    return torch.where((made > 0) & (read > 0), gains, torch.ones_like(gains))
