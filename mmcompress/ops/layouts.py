"""Integer weights as other tools' checkpoints have them: several codes to a 32-bit word.

    word = sum over i of code_i * 2^(bits * i),    i = 0 .. 32 / bits - 1, read as an int32

compressed-tensors (its `pack-quantized` format) packs along a weight's inputs, and the zero points of groups along the outputs.
It calls a code of b bits what is ours less 2^(b-1), and adds that again before it packs: the words hold our codes.

GPTQ (AutoGPTQ, GPTQModel) has all of it transposed; weights are packed along the inputs, zero points along the outputs. Its first
format stores the zero point less 1. A zero point of 0 has then no code: some readers add 1 to whole words, where it would
carry into the next code, others to each code. `gptq_v2` stores the zero point itself.

AWQ (AutoAWQ, "gemm") packs both along the outputs, those of a word in the order 0, 2, 4, 6, 1, 3, 5, 7, from which its CUDA kernel
gets pairs of halves by one mask and one shift.

Shape alphabet: R rows (outputs), C columns (inputs), G groups of neighbouring columns, P codes to a word: 8 of 4 bits, 4 of 8.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompress.ops.grouped import Grouped, pack, unpack

Bits = Literal[4, 8]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of eight whose code lies at each place of a word, lowest bits first."""


def words(codes: Tensor, bits: Bits) -> Tensor:
    """Return codes (R, C) uint8 as words (R, ceil(C / P)) int32, filled up with 0."""
    filled = pad(codes, (0, -codes.shape[1] % (32 // bits)))
    held = pack(filled) if bits == 4 else filled
    # Bytes of a word lie lowest first, in memory as in a checkpoint. Flat: a transposed row has strides no word can have.
    return held.reshape(-1).view(torch.int32).reshape(len(codes), -1)


def codes_of(packed: Tensor, bits: Bits, columns: int) -> Tensor:
    """Return the codes (R, columns) uint8 of words (R, ceil(columns / P)): what `words` was given."""
    held = packed.reshape(-1).view(torch.uint8).reshape(len(packed), -1)
    return unpack(held, columns) if bits == 4 else held[:, :columns]


def compressed_tensors_int4(weight: Grouped) -> dict[str, Tensor]:
    """Return weight_packed (R, C / 8), weight_scale (R, G), weight_zero_point (ceil(R / 8), G) and weight_shape (2,)."""
    return {
        "weight_packed": words(weight.codes, 4),
        "weight_scale": weight.scale,
        "weight_zero_point": words(weight.zero_point.t(), 4).t().contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
    }


def compressed_tensors_int8(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return weight_packed (R, ceil(C / 4)), weight_scale (R, G) and weight_shape (2,) of int8 codes (R, C) and a scale, or G."""
    return {
        "weight_packed": words((codes.to(torch.int16) + 128).to(torch.uint8), 8),
        "weight_scale": scale if scale.ndim == 2 else scale[:, None],
        "weight_shape": torch.tensor(codes.shape),
    }


def compressed_tensors_float4(codes: Tensor, blocks: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return weight_packed (R, C / 2), weight_scale (R, G) and, with E4M3 scales, the inverse of the matrix's, (1,) float32.

    codes: two to a byte, the earlier in the lower half; blocks: uint8 (E8M0) or E4M3; scale: ().
    """
    made = {"weight_packed": codes, "weight_scale": blocks}
    return made if blocks.dtype == torch.uint8 else {**made, "weight_global_scale": scale.float().reciprocal()[None]}


def gptq(weight: Grouped, first_format: bool) -> dict[str, Tensor]:
    """Return qweight (C / 8, R), qzeros (G, R / 8), scales (G, R) float16 and g_idx (C,) int32, the group of each column.

    `first_format`: zero points are stored less 1; none may then be 0.
    """
    rows, columns = weight.codes.shape
    assert rows % 8 == columns % 8 == 0, f"{rows} rows and {columns} columns; eight share a word"
    assert not first_format or bool(weight.zero_point.all()), "a zero point of 0 has no code in GPTQ's first format"
    zeros = weight.zero_point - 1 if first_format else weight.zero_point
    return {
        "qweight": words(weight.codes, 4).t().contiguous(),
        "qzeros": words(zeros.t(), 4),
        "scales": weight.scale.half().t().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // weight.scale.shape[1]),
    }


def awq(weight: Grouped) -> dict[str, Tensor]:
    """Return qweight (C, R / 8), qzeros (G, R / 8) and scales (G, R) float16."""
    rows = len(weight.codes)
    assert rows % 8 == 0, f"{rows} rows; eight share a word"
    return {
        "qweight": words(_interleaved(weight.codes.t()), 4),
        "qzeros": words(_interleaved(weight.zero_point.t()), 4),
        "scales": weight.scale.half().t().contiguous(),
    }


def _interleaved(codes: Tensor) -> Tensor:
    """Return (X, R) with each eight columns in AWQ's order."""
    return codes.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)


def in_groups_of(weight: Grouped, size: int) -> Grouped:
    """Return the same weight in groups of `size` columns, which divides the size it has: scales and zero points are repeated."""
    repeats = weight.codes.shape[1] // weight.scale.shape[1] // size
    return Grouped(
        weight.codes, weight.scale.repeat_interleave(repeats, 1), weight.zero_point.repeat_interleave(repeats, 1)
    )
