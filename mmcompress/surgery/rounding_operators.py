"""What quantized layers do while they are exported, as operators of our own.

torch's exporter would fold int8 weights back into float constants; it leaves operators it does not know alone, and
`translation_table` says what they are in ONNX. Linear weights leave transposed, (in, out) with the scale on axis 1: the one layout
that both onnxruntime and OpenVINO multiply as integers without further reshuffling. Weights of 4 bits leave as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmcompress.ops.rounding import INT8, UINT8, Levels, dequantize, fake_quantize

_LIBRARY = torch.library.Library("mmcompress", "DEF")
_LIBRARY.define("round_values(Tensor x, Tensor scale, Tensor zero_point) -> Tensor")
_LIBRARY.define("int8_matrix(Tensor codes, Tensor scale) -> Tensor")
_LIBRARY.define("int8_filters(Tensor codes, Tensor scale) -> Tensor")

FLOAT_INPUTS, ROUNDED_INPUTS = 1, 4
"""The accuracy level of a MatMulNBits, as onnxruntime calls it: float32, or inputs rounded to 8 bits, block by block."""


def levels_of(zero_point: Tensor) -> Levels:
    """Return the grid whose zero points have this dtype."""
    return UINT8 if zero_point.dtype == torch.uint8 else INT8


@torch.library.impl(_LIBRARY, "round_values", "CompositeExplicitAutograd")
def _round_values(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return fake_quantize(x, scale, zero_point, levels_of(zero_point))


@torch.library.impl(_LIBRARY, "int8_matrix", "CompositeExplicitAutograd")
def _int8_matrix(codes: Tensor, scale: Tensor) -> Tensor:
    """(out, in) int8 and (out,) -> (in, out) float."""
    return dequantize(codes, scale, axis=0).t().contiguous()


@torch.library.impl(_LIBRARY, "int8_filters", "CompositeExplicitAutograd")
def _int8_filters(codes: Tensor, scale: Tensor) -> Tensor:
    """(out, in, h, w) int8 and (out,) -> float."""
    return dequantize(codes, scale, axis=0)


def product_int4(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, block: int, rounds_inputs: bool
) -> Tensor:
    """Return x (..., C) times a packed weight (R, C) as MatMulNBits; only while exporting, where nothing is computed.

    `codes` (R, C / 2), `scale` (R, G) and `zero_point` (R, ceil(G / 2)) are those of `surgery.packed`. A single group, of a whole
    row, is repeated for every block: its packed zero point fills both halves of its byte.
    """
    (rows, half), blocks = codes.shape, 2 * codes.shape[1] // block
    made: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (
            x,
            codes.reshape(rows, blocks, block // 2),
            scale.expand(rows, blocks),
            zero_point.expand(rows, (blocks + 1) // 2),
        ),
        attrs={
            "K": 2 * half,
            "N": rows,
            "bits": 4,
            "block_size": block,
            "accuracy_level": ROUNDED_INPUTS if rounds_inputs else FLOAT_INPUTS,
        },
        dtype=x.dtype,
        shape=(*x.shape[:-1], rows),
        version=1,
    )
    return made


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return what torch.onnx.export(dynamo=True) needs as `custom_translation_table` for models with quantized layers."""
    from onnxscript import opset19 as op

    def round_values(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    # Without a zero point DequantizeLinear means 0, and no (C,) tensor of zeros is stored beside every weight.
    def int8_matrix(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(op.Transpose(codes, perm=[1, 0]), scale, axis=1)

    def int8_filters(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0)

    ops = torch.ops.mmcompress
    return {
        ops.round_values.default: round_values,
        ops.int8_matrix.default: int8_matrix,
        ops.int8_filters.default: int8_filters,
    }
