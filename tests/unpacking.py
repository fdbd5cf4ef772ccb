"""Readers of other tools' layouts, written from their formats' documentation: independent of how we write them.

GPTQ: AutoGPTQ's `QuantLinear.forward` of 4 bits. AWQ: AutoAWQ's `unpack_awq` and `reverse_awq_order`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SHIFTS = torch.arange(0, 32, 4)


def read_gptq(stored: Mapping[str, Tensor], added: int) -> Tensor:
    """(R, C) float32; `added` to zero points: 1 in the first format, 0 in gptq_v2."""
    codes = (stored["qweight"][:, None, :] >> SHIFTS[None, :, None]) & 15
    zeros = ((stored["qzeros"][:, :, None] >> SHIFTS) & 15).flatten(1) + added
    group = stored["g_idx"].long()
    return (stored["scales"].float()[group] * (codes.flatten(0, 1) - zeros[group])).T


def read_awq(stored: Mapping[str, Tensor]) -> Tensor:
    """(R, C) float32."""

    def read(words: Tensor) -> Tensor:
        found = ((words[:, :, None] >> SHIFTS) & 15)[..., [0, 4, 1, 5, 2, 6, 3, 7]]
        return found.flatten(1)

    codes, zeros, scales = read(stored["qweight"]), read(stored["qzeros"]), stored["scales"].float()
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T
