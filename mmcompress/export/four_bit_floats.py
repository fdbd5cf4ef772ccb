"""Weights of 4-bit floats in ONNX's own types: FLOAT4E2M1 constants, two to a byte, before a DequantizeLinear in blocks.

    NVFP4   DequantizeLinear(codes, DequantizeLinear(E4M3 block scales, scale), axis 1, block size 16), Transpose
    MXFP4   DequantizeLinear(codes, Cast(E8M0 block scales), axis 1, block size 32), Transpose

FLOAT4E2M1 came with operator set 23, E8M0 with 24; the other operators of these graphs mean there what they did in older sets.
onnxruntime's CPU provider (1.32) has an implementation for neither, OpenVINO (2026.4) for both.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnxscript import ir

from mmcompress.export.constants import constant, initializer, name, nodes
from mmcompress.surgery.float4 import MATRIX

NVFP4, MXFP4 = (23, 11), (24, 12)
"""The operator set and the version of the format that have the types."""


def store_four_bit_floats(model: ir.Model) -> int:
    """Say every weight of 4-bit floats in ONNX's types; return how many there were."""
    count = 0
    for node in nodes(model, MATRIX):
        packed, blocks = constant(node.inputs[0]), constant(node.inputs[1])
        assert packed is not None, f"{node.name} has no codes"
        assert blocks is not None, f"{node.name} has no scales"
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        weight = initializer(model, codes.view(ml_dtypes.float4_e2m1fn), name(node.inputs[0]))
        powers = blocks.dtype == np.uint8
        steps = initializer(model, blocks.view(ml_dtypes.float8_e8m0fnu) if powers else blocks, name(node.inputs[1]))
        kind = node.outputs[0].dtype
        if powers:
            scale = ir.node("Cast", [steps], {"to": kind}, name=f"{node.name}_scale")
        else:
            scale = ir.node("DequantizeLinear", [steps, node.inputs[2]], name=f"{node.name}_scale")
        size = codes.shape[1] // blocks.shape[1]
        floats = ir.node(
            "DequantizeLinear", [weight, scale.outputs[0]], {"axis": 1, "block_size": size}, name=f"{node.name}_floats"
        )
        turned = ir.node("Transpose", [floats.outputs[0]], {"perm": [1, 0]}, name=f"{node.name}_turned")
        turned.outputs[0].shape, turned.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, [scale, floats, turned])
        ir.convenience.replace_all_uses_with(node.outputs[0], turned.outputs[0])
        opset, version = MXFP4 if powers else NVFP4
        model.opset_imports[""] = max(opset, model.opset_imports[""])
        model.ir_version = max(version, model.ir_version)
        count += 1
    return count


def has_four_bit_floats(graph: onnx.ModelProto) -> bool:
    """Whether a graph holds constants that onnxruntime's CPU provider cannot read."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT4E2M1 for tensor in graph.graph.initializer)


def blank_four_bit_floats(graph: onnx.ModelProto) -> None:
    """Put zeros in the place of weights of 4-bit floats, for who asks onnxruntime for shapes alone."""
    sizes = {t.name: list(t.dims) for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT4E2M1}
    gone, kept = set(sizes), []
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in sizes:
            shape = onnx.numpy_helper.from_array(np.array(sizes[node.input[0]], np.int64), f"{node.output[0]}_shape")
            graph.graph.initializer.append(shape)
            gone.add(node.input[1])
            node = onnx.helper.make_node("ConstantOfShape", [shape.name], list(node.output), node.name)
        kept.append(node)
    kept = [node for node in kept if not gone.intersection(node.output)]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    stored = [tensor for tensor in graph.graph.initializer if tensor.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(stored)
