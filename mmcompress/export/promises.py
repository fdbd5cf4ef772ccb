"""Is the exported graph really as small as the model it came from? Exporters like to unpack integers and to copy shared weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from onnxscript import ir
from torch import Tensor

from mmcompress.errors import GateFailed
from mmcompress.export.trace import Graph, Traced
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized_base import Quantized

SLACK_SHARE = 0.01
SLACK_BYTES = 16 * 1024
"""Shapes, ranges and zero points that exist in a graph but not in a state dict."""

_INTEGERS = {torch.int8, torch.uint8, torch.float8_e4m3fn}
_STORED = ("INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT4E2M1", "FLOAT8E8M0")


@dataclass(frozen=True)
class Promise:
    """What the torch part holds: bytes of everything, tables included, and its integer matrices."""

    bytes: int
    quantized: int
    quantized_bytes: int


def promise(module: Traced, graph: Graph) -> Promise:
    """Count the parameters and buffers the part computes with, tied ones once."""
    stored = {**dict(module.model.named_parameters(remove_duplicate=False)), **dict(module.model.named_buffers())}
    own = list({(v.data_ptr(), v.shape): v for name, v in stored.items() if name in graph.used}.values())
    # Zero points are no weights, and where experts lie side by side, fewer bytes hold them.
    points = {layer.weight_zero_point.data_ptr() for layer in module.model.modules() if isinstance(layer, PackedLinear)}
    packed = [v for v in own if v.dtype in _INTEGERS and v.dim() >= 2 and v.data_ptr() not in points]
    # Layers that have learned nothing yet are zeros, and the exporter keeps equal ones once.
    blank = {value.shape: value for value in packed if not value.view(torch.uint8).any()}
    packed = [*(value for value in packed if value.view(torch.uint8).any()), *blank.values()]
    return Promise(
        bytes=sum(value.nbytes for value in own) + module.part.tables + _repeated(module, own),
        quantized=len(packed),
        quantized_bytes=sum(value.nbytes for value in packed),
    )


def _repeated(module: Traced, own: Collection[Tensor]) -> int:
    """Return the bytes of scales that the graph holds once for every block of a row."""
    scales = {value.data_ptr() for value in own}
    layers = [layer for layer in module.model.modules() if isinstance(layer, Quantized)]
    return sum(layer.repeated_bytes for layer in layers if layer.weight_scale.data_ptr() in scales)


def weights(model: ir.Model) -> dict[str, int]:
    """Return the bytes of initialisers by dtype."""
    found: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            found[value.const_value.dtype.name] += value.const_value.nbytes
    return dict(sorted(found.items()))


def quantized_matrices(model: ir.Model) -> int:
    """Return how many integer weight matrices the graph holds; packed zero points are none, nor scales stored in a byte."""
    places = {"MatMulNBits": (3,), "QMoE": (11, 12)}
    none = {
        node.inputs[place] for node in model.graph for place in places.get(node.op_type, ()) if len(node.inputs) > place
    }
    scales = {node.inputs[1] for node in model.graph if node.op_type == "DequantizeLinear"}
    none |= {node.inputs[0] for node in model.graph if scales.intersection(node.outputs)}
    return sum(
        value not in none
        and value.const_value is not None
        and value.const_value.dtype.name in _STORED
        and len(value.const_value.shape) >= 2
        for value in model.graph.initializers.values()
    )


def check_promise(model: ir.Model, promised: Promise, part: str) -> None:
    """Raise GateFailed when integers were unpacked or weights copied on the way into the graph."""
    found = weights(model)
    integers = sum(found.get(dtype, 0) for dtype in _STORED)
    if integers < promised.quantized_bytes:
        raise GateFailed(
            f"the exported {part} part holds {integers} bytes of integer weights; the model has {promised.quantized_bytes}",
            hint="the exporter unpacked quantized weights; quantize with --keep-float for the layer, and report it "
            "with the versions of torch and onnxscript",
        )
    # A mask that is known beforehand, such as which token comes before which, is no copy of a weight.
    total, limit = sum(found.values()) - found.get("BOOL", 0), promised.bytes * (1 + SLACK_SHARE) + SLACK_BYTES
    if total > limit:
        raise GateFailed(
            f"the exported {part} part holds {total} bytes of weights; the model has {promised.bytes}",
            hint="the exporter copied weights; report it with the versions of torch and onnxscript",
        )
