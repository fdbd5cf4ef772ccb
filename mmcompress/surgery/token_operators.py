"""What layers that round each token, or compute in E4M3, do while they are exported; `rounding_operators` tells why there are such.

A token's scale is taken out of its product, see `ops.token_rounding`: what is left is QuantizeLinear and DequantizeLinear with a
scale of 1, by which onnxruntime, OpenVINO and TensorRT know a product of integers. It is as fast as DynamicQuantizeLinear with
MatMulInteger in onnxruntime, and three times as fast as that in OpenVINO, which has no kernel for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmcompress.ops.float8 import FLOAT8, fake_float8, nearest_float8
from mmcompress.ops.grouped import GROUP_SIZES, group_size_for
from mmcompress.ops.rounding import dequantize
from mmcompress.ops.token_rounding import TokenGrid, token_scale
from mmcompress.surgery.rounding_operators import ROUNDED_INPUTS

_LIBRARY = torch.library.Library("mmcompress", "FRAGMENT")
_LIBRARY.define("whole_uint8(Tensor x) -> Tensor")
_LIBRARY.define("whole_int8(Tensor x) -> Tensor")
_LIBRARY.define("whole_float8(Tensor x) -> Tensor")
_LIBRARY.define("integers(Tensor steps) -> Tensor")
_LIBRARY.define("floats(Tensor codes, Tensor like) -> Tensor")
_LIBRARY.define("float8_input(Tensor x, Tensor scale) -> Tensor")
_LIBRARY.define("float8_matrix(Tensor codes, Tensor scale) -> Tensor")

_WHOLE = {torch.uint8: "whole_uint8", torch.int8: "whole_int8", FLOAT8.dtype: "whole_float8"}


@torch.library.impl(_LIBRARY, "whole_uint8", "CompositeExplicitAutograd")
def _whole_uint8(x: Tensor) -> Tensor:
    return x.round()


@torch.library.impl(_LIBRARY, "whole_int8", "CompositeExplicitAutograd")
def _whole_int8(x: Tensor) -> Tensor:
    return x.round()


@torch.library.impl(_LIBRARY, "whole_float8", "CompositeExplicitAutograd")
def _whole_float8(x: Tensor) -> Tensor:
    return nearest_float8(x)


@torch.library.impl(_LIBRARY, "integers", "CompositeExplicitAutograd")
def _integers(steps: Tensor) -> Tensor:
    return steps.round().to(torch.int8)


@torch.library.impl(_LIBRARY, "floats", "CompositeExplicitAutograd")
def _floats(codes: Tensor, like: Tensor) -> Tensor:
    return codes.to(like.dtype)


@torch.library.impl(_LIBRARY, "float8_input", "CompositeExplicitAutograd")
def _float8_input(x: Tensor, scale: Tensor) -> Tensor:
    return fake_float8(x, scale)


@torch.library.impl(_LIBRARY, "float8_matrix", "CompositeExplicitAutograd")
def _float8_matrix(codes: Tensor, scale: Tensor) -> Tensor:
    """(out, in) E4M3 and (out,) -> (in, out) float."""
    return dequantize(codes, scale, axis=0).t().contiguous()


def token_product(x: Tensor, matrix: Tensor, grid: TokenGrid) -> Tensor:
    """Return x (…, C) times `matrix` (C, M), each token rounded; only while exporting."""
    scale = token_scale(x, grid)
    whole: Callable[[Tensor], Tensor] = getattr(torch.ops.mmcompress, _WHOLE[grid.dtype])
    return (whole(x / scale) @ matrix) * scale


def integers(steps: Tensor) -> Tensor:
    """Return the nearest int8 codes of `steps` (…, C), which are within -127..127."""
    return torch.ops.mmcompress.integers(steps) if torch.compiler.is_exporting() else _integers(steps)


def floats(codes: Tensor, like: Tensor) -> Tensor:
    """Return int8 `codes` in the dtype of `like`."""
    return torch.ops.mmcompress.floats(codes, like) if torch.compiler.is_exporting() else codes.to(like.dtype)


def block_of(columns: int) -> int:
    """Return the size of the blocks in which a runtime rounds inputs beside a weight of 8 bits; 0 where none divides them."""
    return group_size_for(columns, GROUP_SIZES[0])


def product_int8(x: Tensor, codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """Return x (…, C) times a weight (R, C) int8 with scales (R,) as MatMulNBits; only while exporting, where nothing is computed.

    Codes and scales are put into the blocks the operator wants when the graph is there: `export.eight_bits`.
    """
    rows, columns = codes.shape
    made: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (x, codes, scale),
        attrs={
            "K": columns,
            "N": rows,
            "bits": 8,
            "block_size": block,
            "accuracy_level": ROUNDED_INPUTS,
        },
        dtype=x.dtype,
        shape=(*x.shape[:-1], rows),
        version=1,
    )
    return made


def token_table() -> dict[Any, Callable[..., Any]]:
    """Return the part of `custom_translation_table` for the operators of this file."""
    import onnx
    from onnxscript import opset19

    op: Any = opset19  # its annotations describe tensors, while constants are given as numbers here

    def constant(kind: int, value: float) -> Any:
        return op.Constant(value=onnx.helper.make_tensor("zero_point", kind, [], [value]))

    def whole(kind: int, zero_point: float) -> Callable[[Any], Any]:
        def rounded(x: Any) -> Any:
            one, zero = op.CastLike(op.Constant(value_float=1.0), x), constant(kind, zero_point)
            return op.DequantizeLinear(op.QuantizeLinear(x, one, zero), one, zero)

        return rounded

    def integers(steps: Any) -> Any:
        return op.QuantizeLinear(
            steps, op.CastLike(op.Constant(value_float=1.0), steps), constant(onnx.TensorProto.INT8, 0)
        )

    def floats(codes: Any, like: Any) -> Any:
        one = op.CastLike(op.Constant(value_float=1.0), like)
        return op.DequantizeLinear(codes, one, constant(onnx.TensorProto.INT8, 0))

    def float8_input(x: Any, scale: Any) -> Any:
        zero = constant(onnx.TensorProto.FLOAT8E4M3FN, 0.0)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    def float8_matrix(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(op.Transpose(codes, perm=[1, 0]), scale, axis=1)

    ops = torch.ops.mmcompress
    return {
        ops.whole_uint8.default: whole(onnx.TensorProto.UINT8, 128),
        ops.whole_int8.default: whole(onnx.TensorProto.INT8, 0),
        ops.whole_float8.default: whole(onnx.TensorProto.FLOAT8E4M3FN, 0.0),
        ops.integers.default: integers,
        ops.floats.default: floats,
        ops.float8_input.default: float8_input,
        ops.float8_matrix.default: float8_matrix,
    }
