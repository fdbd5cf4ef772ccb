"""Linears of 8-bit weights that a graph multiplies as they are stored: MatMulNBits, with codes and scales in its blocks.

The operator wants unsigned codes (R, K, S), whose zero point is 128 where none is given, and a scale for each block. A layer has
signed ones and a scale for each row. What it shares with an embedding table is stored once: rows are then looked up among the
blocks, and 128 is taken from them.

Shape alphabet: R rows, C columns, K blocks of S columns each, C = K * S.
"""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from mmcompress.export.constants import constant, initializer, name, nodes

ZERO_POINT = 128


def store_in_blocks(model: ir.Model) -> int:
    """Put the weights of MatMulNBits with signed codes into blocks; return of how many."""
    count = 0
    for node in nodes(model, "MatMulNBits"):
        codes, scale = constant(node.inputs[1]), constant(node.inputs[2])
        if codes is None or codes.dtype != np.int8:
            continue
        assert scale is not None, f"{node.name} has codes and no scale"
        columns = node.attributes.get_int("K", 0)
        block = node.attributes.get_int("block_size", 0)
        blocked = (codes.view(np.uint8) ^ ZERO_POINT).reshape(len(codes), columns // block, block)
        made = initializer(model, blocked, f"{name(node.inputs[1])}_blocks")
        _look_up_among(model, codes, made)
        node.replace_input_with(1, made)
        scales = np.repeat(scale[:, None], columns // block, axis=1)
        node.replace_input_with(2, initializer(model, scales, f"{name(node.inputs[2])}_blocks"))
        count += 1
    return count


def _look_up_among(model: ir.Model, codes: np.ndarray, blocks: ir.Value) -> None:
    """Let what looks up rows of a table of the same `codes` (R, C) find them in their `blocks` (R, K, S)."""
    for node in nodes(model, "Gather", "GatherND"):
        table, shape = constant(node.inputs[0]), node.outputs[0].shape
        elsewhere = node.attributes.get_int("axis", 0) or node.attributes.get_int("batch_dims", 0)
        if elsewhere or shape is None or table is None or table.dtype != np.int8:
            continue
        # Not by name: on the way here the exporter has copied the table.
        if not np.array_equal(table, codes):
            continue
        found = ir.node(node.op_type, [blocks, *node.inputs[1:]], name=f"{node.name}_blocks")
        wide = ir.node("Cast", found.outputs, {"to": ir.DataType.INT32}, name=f"{node.name}_wide")
        offset = initializer(model, np.array(ZERO_POINT, np.int32), f"{node.name}_zero_point")
        signed = ir.node("Sub", [wide.outputs[0], offset], name=f"{node.name}_signed")
        size = initializer(model, np.array([0] * (len(shape) - 1) + [-1]), f"{node.name}_size")
        rows = ir.node("Reshape", [signed.outputs[0], size], name=f"{node.name}_rows")
        rows.outputs[0].shape, rows.outputs[0].type = shape, ir.TensorType(ir.DataType.INT32)
        model.graph.insert_before(node, [found, wide, signed, rows])
        ir.convenience.replace_all_uses_with(node.outputs[0], rows.outputs[0])
