"""How many multiply-accumulates one ONNX operator does, from the shapes around it: a table that can be read.

Standard operators as the ONNX operator reference defines their inputs, those of com.microsoft as ONNX Runtime's list of
contributed operators does. A padded or masked position counts like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
Macs = Callable[["onnx.NodeProto", Sequence[Shape], Sequence[Shape]], int]


@dataclass(frozen=True)
class Rule:
    """MACs from (node, input shapes, output shapes), and which of those shapes it looks at."""

    macs: Macs
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    import onnx

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def _product(left: int, right: int) -> Rule:
    """a: (..., N, C) times b: (..., C, M), stacks broadcast, with the one-dimensional cases of numpy.matmul."""

    def macs(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
        a, b = inputs[left], inputs[right]
        a = (1, *a) if len(a) == 1 else a
        b = (*b, 1) if len(b) == 1 else b
        rows, inner = a[-2:] if not _attribute(node, "transA", 0) else a[:-3:-1]
        columns = b[-2] if _attribute(node, "transB", 0) else b[-1]
        return _stack(a[:-2], b[:-2]) * rows * inner * columns

    return Rule(macs, (left, right))


def _stack(a: Shape, b: Shape) -> int:
    """Matrices in the broadcast of two stacks."""
    short, long = sorted((a, b), key=len)
    padded = (1,) * (len(long) - len(short)) + short
    return math.prod(max(pair) for pair in zip(padded, long, strict=True))


def _packed_product(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """a: (..., N, C) times weights stored in blocks; attribute N is the number of outputs."""
    return math.prod(inputs[0]) * int(_attribute(node, "N", 0))


def _experts(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """x: (..., C), weights of E experts (E, rows, ...): each token meets k of them; rows hold gates too where they are fused."""
    (*tokens, channels), rows = inputs[0], inputs[2][1]
    fused = _attribute(node, "swiglu_fusion", 0) and _attribute(node, "activation_type", b"") == b"swiglu"
    neurons = rows // 2 if fused else rows
    return math.prod(tokens) * int(_attribute(node, "k", 1)) * channels * (rows + neurons)


def _convolution(weights: int) -> Rule:
    """weights: (M, C/groups, k...); every output element sums over the rest of its filter."""

    def macs(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
        return math.prod(outputs[0]) * math.prod(inputs[weights][1:])

    return Rule(macs, (weights,), (0,))


def _transposed_convolution(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """weights: (C, M/groups, k...); every input element is spread over the rest of its filter."""
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _attention(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Standard Attention. query: (B,H,N,D) or (B,N,H*D), key and value likewise over S positions, past keys added."""
    query, key, value = inputs[:3]
    past = inputs[4][-2] if len(inputs) > 4 and inputs[4] else 0
    if len(query) == 4:
        return math.prod(query[:-1]) * (key[-2] + past) * (query[-1] + value[-1])
    heads, kv_heads = _attribute(node, "q_num_heads", 1), _attribute(node, "kv_num_heads", 1)
    return query[0] * query[1] * (key[1] + past) * (query[-1] + heads * (value[-1] // kv_heads))


def _attention_with_projection(past: int) -> Rule:
    """com.microsoft: x (B,N,C), weights (C, 3*hidden): the three projections and the two products of attention."""

    def macs(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
        (batch, tokens, channels), (_, width) = inputs[0], inputs[1]
        sizes = _attribute(node, "qkv_hidden_sizes", [width // 3] * 3)
        seen = tokens + (inputs[past][-2] if len(inputs) > past and inputs[past] else 0)
        return batch * tokens * (channels * width + seen * (sizes[0] + sizes[2]))

    return Rule(macs, (0, 1, past))


def _multi_head_attention(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """com.microsoft, projected already. query: (B,N,C) or packed (B,N,H,3,D); key: (B,S,C), (B,S,H,2,D) or (B,H,S,D)."""
    query = inputs[0]
    key = inputs[1] if len(inputs) > 1 and inputs[1] else ()
    value = inputs[2] if len(inputs) > 2 and inputs[2] else ()
    past = inputs[6][-2] if len(inputs) > 6 and inputs[6] else 0
    width = query[2] * query[4] if len(query) == 5 else query[-1]
    value_width = width if not value else value[-1] * (value[1] if len(value) == 4 else 1)
    seen = (query[1] if not key else key[2] if len(key) == 4 else key[1]) + past
    return query[0] * query[1] * seen * (width + value_width)


def _einsum(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """One MAC per point of the space all indices span; none where nothing is summed over a second factor."""
    equation = _attribute(node, "equation", b"").decode().replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:  # the implicit result holds the letters that occur once
        result = "".join(letter for letter in left if left.count(letter) == 1)
    if len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=True):
        before, dots, after = term.partition("...")
        names = list(before) + [f".{i}" for i in range(len(shape) - len(before + after), 0, -1)] * bool(dots)
        for name, size in zip(names + list(after), shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    summed = [name for name in sizes if not name.startswith(".") and name not in result]
    return math.prod(sizes.values()) if summed else 0


_MICROSOFT = "com.microsoft."
_FIRST_TWO, _FIRST_AND_FOURTH = _product(0, 1), _product(0, 3)

RULES: dict[str, Rule] = {
    "MatMul": _FIRST_TWO,
    "Gemm": _FIRST_TWO,
    "MatMulInteger": _FIRST_TWO,
    "QLinearMatMul": _FIRST_AND_FOURTH,
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": Rule(_transposed_convolution, (0, 1)),
    "Attention": Rule(_attention, (0, 1, 2, 4)),
    "Einsum": Rule(_einsum, (0, 1, 2, 3)),
    _MICROSOFT + "FusedMatMul": _FIRST_TWO,
    _MICROSOFT + "FusedGemm": _FIRST_TWO,
    _MICROSOFT + "MatMulIntegerToFloat": _FIRST_TWO,
    _MICROSOFT + "DynamicQuantizeMatMul": _FIRST_TWO,
    _MICROSOFT + "QGemm": _FIRST_AND_FOURTH,
    _MICROSOFT + "QLinearConv": _convolution(3),
    _MICROSOFT + "FusedConv": _convolution(1),
    _MICROSOFT + "MatMulNBits": Rule(_packed_product, (0,)),
    _MICROSOFT + "MoE": Rule(_experts, (0, 2)),
    _MICROSOFT + "QMoE": Rule(_experts, (0, 2)),
    _MICROSOFT + "Attention": _attention_with_projection(4),
    _MICROSOFT + "QAttention": _attention_with_projection(8),
    _MICROSOFT + "MultiHeadAttention": Rule(_multi_head_attention, (0, 1, 2, 6)),
}

NO_RULE = {
    "LSTM",
    "GRU",
    "RNN",
    "DeformConv",
    *(
        _MICROSOFT + name
        for name in (
            "DynamicQuantizeLSTM",
            "GemmFloat8",
            "GroupQueryAttention",
            "PackedMultiHeadAttention",
        )
    ),
}
"""Operators that multiply matrices and have no rule: reported as uncounted, never passed over in silence."""
