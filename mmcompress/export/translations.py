"""How some torch operators are written in ONNX, where the exporter's own way costs speed or loses precision.

* Attention. The exporter scales queries and keys apart, transposes keys through two reshapes whose shapes are computed
  at run time, and guards every softmax against rows that are masked everywhere. Here it is MatMul, Mul, Add, Softmax,
  MatMul: the form that onnxruntime, OpenVINO and TensorRT recognise. A row that is masked everywhere gives the mean of
  the values instead of zeros.
* Quantized layers, by the table of `surgery.quantized`.

Shape alphabet: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import ir, opset18

from mmcompress.surgery.rounding_operators import translation_table
from mmcompress.surgery.token_operators import token_table

op: Any = opset18
"""Builds nodes; its annotations describe tensors, while constants are given as numbers here."""

HIDDEN = -10000.0
"""Added to the scores of masked keys: exp() of it is 0 in every precision, and it fits in float16."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query keyᵀ scale + mask) value, for query (B, H, N, D); a boolean mask is True where a key may be seen."""
    if enable_gqa:
        groups = int(query.shape[1]) // int(key.shape[1])
        key, value = (_repeat_heads(part, groups) for part in (key, value))
    factor = 1 / math.sqrt(int(query.shape[-1])) if scale is None else scale
    scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), _like(factor, query))
    if is_causal:
        rows, columns = _positions(query), _positions(key)
        attn_mask = op.LessOrEqual(columns, op.Unsqueeze(rows, op.Constant(value_ints=[1])))
        scores = op.Add(scores, _bias(attn_mask, query))
    elif attn_mask is not None:
        scores = op.Add(scores, _bias(attn_mask, query) if attn_mask.dtype == ir.DataType.BOOL else attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _like(number: float, tensor: Any) -> Any:
    return op.CastLike(op.Constant(value_float=number), tensor)


def _bias(mask: Any, like: Any) -> Any:
    return op.Where(mask, _like(0.0, like), _like(HIDDEN, like))


def _positions(tensor: Any) -> Any:
    """0, 1, …, N - 1 for a tensor (B, H, N, D)."""
    length = op.Squeeze(op.Shape(tensor, start=2, end=3))
    return op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))


def _repeat_heads(tensor: Any, groups: int) -> Any:
    """(B, H, N, D) -> (B, H * groups, N, D), each head `groups` times in a row."""
    heads = [index for head in range(int(tensor.shape[1])) for index in [head] * groups]
    return op.Gather(tensor, op.Constant(value_ints=heads), axis=1)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the table torch.onnx.export takes as `custom_translation_table`."""
    return {torch.ops.aten.scaled_dot_product_attention.default: attention, **translation_table(), **token_table()}
