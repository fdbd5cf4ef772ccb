"""Floats of 4 bits (E2M1) in blocks of neighbouring columns that share a scale: MXFP4 and NVFP4.

    code        (-1)^s times 0, 0.5, 1, 1.5, 2, 3, 4 or 6; the upper of its bits is s
    value       code * scale of the block * scale of the matrix

    MXFP4       blocks of 32, whose scales are powers of two (E8M0: one byte e, 2^(e - 127)); the matrix has none (1)
                (OCP Microscaling Formats v1.0, 2023, sections 5.2 and 6.3)
    NVFP4       blocks of 16, whose scales are E4M3 numbers; the matrix has one, by which the largest of those is 224 to 448: a
                power of two here, so that whoever divides by its inverse gets the same numbers

The standards leave open which scale a block gets. Of the two that are near its largest weight over 6, one of which lets that weight
be a little off, it is the one with less squared error.

Shape alphabet: R rows (outputs), C columns (inputs), G blocks of S columns each, C = G * S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress.ops.float8 import FLOAT8, nearest_float8, straight_through

Format = Literal["mxfp4", "nvfp4"]
BLOCKS: dict[str, int] = {"mxfp4": 32, "nvfp4": 16}
"""Format -> how many columns share a scale."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]
BIAS = 127
"""Of the exponents of E8M0."""


@dataclass(frozen=True)
class Blocked:
    """A matrix (R, C) as codes (R, C) uint8 and a stored scale (R, G) for each block: uint8 (E8M0) or E4M3."""

    codes: Tensor
    scale: Tensor


def to_codes(steps: Tensor) -> Tensor:
    """Return the codes nearest to `steps`, uint8; of two as near, the one whose last bit is 0."""
    size = steps.abs()
    # Halfway between two neighbours the even one takes it: a boundary belongs to the side that the comparison says.
    above = (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0)
    code = torch.stack(above).sum(0).to(torch.uint8)
    return code | (torch.signbit(steps).to(torch.uint8) << 3)


def from_codes(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what codes stand for."""
    table = torch.tensor([*MAGNITUDES, *(-size for size in MAGNITUDES)], dtype=dtype, device=codes.device)
    return table[codes.long()]


def whole_scale(largest: Tensor, form: Format) -> Tensor:
    """Return the scale of a matrix whose largest size of a weight is `largest` (): 1 with MXFP4."""
    if form == "mxfp4":
        return torch.ones_like(largest)
    return torch.exp2(torch.ceil(torch.log2(largest / (LARGEST * FLOAT8.high)))).where(
        largest > 0, torch.ones_like(largest)
    )


def block_scales(stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return stored scales as floats; E8M0 ones are exact in float32 and bfloat16."""
    if stored.dtype == torch.uint8:
        return torch.exp2(stored.to(torch.float32) - BIAS).to(dtype)
    return stored.to(dtype)


def rounded(weight: Tensor, whole: Tensor, form: Format) -> Blocked:
    """Return `weight` (R, C) in blocks, of a matrix of the scale `whole` ()."""
    steps = weight.detach().float().unflatten(1, (-1, BLOCKS[form])) / whole.float()  # (R, G, S)
    best: Blocked | None = None
    least: Tensor | None = None
    for stored in _candidates(steps.abs().amax(-1), form):
        found = on_grid(steps, stored)
        error = (from_codes(found.codes) * block_scales(stored)[..., None] - steps).square().sum(-1)
        if best is None or least is None:
            best, least = found, error
        else:
            better = error < least
            best = Blocked(
                torch.where(better[..., None], found.codes, best.codes),
                # E4M3 has no `where` of its own: chosen as bytes.
                torch.where(better, found.scale.view(torch.uint8), best.scale.view(torch.uint8)).view(stored.dtype),
            )
            least = torch.minimum(error, least)
    assert best is not None, "a block has scales to choose from"
    return Blocked(best.codes.flatten(1), best.scale)


def on_grid(steps: Tensor, stored: Tensor) -> Blocked:
    """Return `steps` (R, G, S) at the nearest places of their blocks' grids."""
    scale = block_scales(stored)[..., None]
    return Blocked(to_codes(torch.where(scale > 0, steps / scale, torch.zeros_like(steps))), stored)


def _candidates(largest: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Return the stored scales of blocks with these largest sizes: the one that covers them, and one beside it."""
    if form == "nvfp4":
        # A largest weight at 4 in place of 6 has finer neighbours.
        return tuple(nearest_float8(largest / at).to(FLOAT8.dtype) for at in (LARGEST, 4.0))  # type: ignore[return-value]
    exponent = torch.ceil(torch.log2((largest / LARGEST).clamp_min(2.0**-BIAS)))
    return tuple((exponent - less + BIAS).clamp(0, 254).to(torch.uint8) for less in (0, 1))  # type: ignore[return-value]


def fake_float4(x: Tensor, scale: Tensor) -> Tensor:
    """Return `x` rounded to E2M1 in steps of `scale`, which broadcasts, in the dtype of `x`; gradients pass straight through."""
    return straight_through(x, scale, lambda steps: from_codes(to_codes(steps)), LARGEST)
