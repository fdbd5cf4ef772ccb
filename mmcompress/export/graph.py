"""Rewrites of an exported graph that keep its meaning and make it cheaper or easier to fuse for every runtime.

Each rewrite is a function of the graph that returns how often it applied. What they rely on is what the exporter writes
(torch 2.13, opset 20): linears as MatMul and Add, weights of quantized linears as DequantizeLinear and Transpose, masks
as Where.

Rounding: only the three `fold_…` change values, by one rounding of float32; a pass over the activations is what they save, once
per residual branch, per attention and per norm.

Not done: queries, keys and values as one product and a Split. On DINOv2-S in int8, one thread, it took 7% more processor
time in onnxruntime and the same in OpenVINO.
"""

from __future__ import annotations

import ast
from collections import Counter

import numpy as np
from onnxscript import ir
from onnxscript.ir.passes import common as cleanups

from mmcompress.export.constants import (
    constant,
    initializer,
    name,
    nodes,
    reshape_constants,
    share_tables,
    split_constants,
    transpose_constants,
)
from mmcompress.export.eight_bits import store_in_blocks
from mmcompress.export.experts import store_experts
from mmcompress.export.four_bit_floats import store_four_bit_floats

_SCOPES = "pkg.torch.onnx.name_scopes"


def simplify(model: ir.Model) -> dict[str, int]:
    """Apply every rewrite in place, remove what became unused, and return how often each applied."""
    name_nodes(model)
    counts = {
        rewrite.__name__: rewrite(model)
        for rewrite in (
            split_constants,
            transpose_constants,
            reshape_constants,
            store_experts,
            store_in_blocks,
            store_four_bit_floats,
            share_tables,
            drop_open_masks,
            fold_channel_scales,
            fold_attention_scales,
            fold_value_gains,
            fold_norm_gains,
            drop_same_casts,
        )
    }
    cleanups.RemoveUnusedNodesPass()(model)
    cleanups.RemoveUnusedOpsetsPass()(model)
    return counts


def name_nodes(model: ir.Model) -> None:
    """Name every node by the module it came from, and drop the exporter's notes: they hold source paths of this machine."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        scopes = [scope for scope in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")) if scope]
        # The last scope is the operator; the one before it the innermost module.
        module = scopes[-2].removeprefix("model.") if len(scopes) > 1 else "graph"
        name = f"{module}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def drop_open_masks(model: ir.Model) -> int:
    """Remove the addition of masks that hide nothing: transformers writes one whenever it is traced."""
    count = 0
    for node in nodes(model, "Where"):
        condition = node.inputs[0]
        while (
            condition is not None and (made := condition.producer()) is not None and made.op_type in ("Expand", "Cast")
        ):
            condition = made.inputs[0]
        shown, added = constant(condition), constant(node.inputs[1])
        if shown is None or not shown.all() or added is None or added.any():
            continue
        for use in list(node.outputs[0].uses()):
            addition = use.node
            scores = addition.inputs[1 - use.idx] if addition.op_type == "Add" else None
            if scores is None or scores.shape is None or scores.shape != addition.outputs[0].shape:
                continue
            ir.convenience.replace_all_uses_with(addition.outputs[0], scores)
            count += 1
    return count


def fold_channel_scales(model: ir.Model) -> int:
    """Linear then Mul by a constant, alone or per channel (LayerScale) -> the linear with scaled weight and bias; float32 only."""
    count = 0
    for node in nodes(model, "Mul"):
        for scaled, factor in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            by = constant(factor)
            if by is None or by.ndim > 1 or by.dtype != np.float32 or scaled is None or scaled.shape is None:
                continue
            width = scaled.shape[-1]
            if not isinstance(width, int) or by.size not in (1, width):
                continue
            if _scale_linear(model, scaled, np.broadcast_to(by, width)):
                ir.convenience.replace_all_uses_with(node.outputs[0], scaled, replace_graph_outputs=True)
                count += 1
                break
    return count


def fold_attention_scales(model: ir.Model) -> int:
    """softmax(scale * queries keysᵀ): the scale moves into the linear that makes the queries; float32 only.

    Not past a rounding of queries: its grid would no longer be the layer's, and what multiplies integers has a scale of its own in
    OpenVINO, which takes this one (python -m bench.compare_nncf).
    """
    count = 0
    for node in nodes(model, "Mul"):
        product, factor = node.inputs
        scale = constant(factor)
        matmul = product.producer() if product is not None else None
        if (
            scale is None
            or scale.size != 1
            or scale.dtype != np.float32
            or matmul is None
            or matmul.op_type != "MatMul"
        ):
            continue
        source = _past_reshapes(matmul.inputs[0])
        if product is None or source is None or len(product.uses()) != 1 or source.shape is None:
            continue
        width = source.shape[-1]
        if isinstance(width, int) and _scale_linear(model, source, np.full(width, scale.item(), np.float32)):
            ir.convenience.replace_all_uses_with(node.outputs[0], product)
            count += 1
    return count


def fold_value_gains(model: ir.Model) -> int:
    """Heads' outputs times a constant per channel (a quantized output layer's gain) -> into the linear that makes the values.

    Attention mixes tokens, never channels, so what scales a channel of its output may scale that channel of the values.
    """
    count = 0
    for node in nodes(model, "Mul"):
        for states, factor in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            by = constant(factor)
            mixed = _past_reshapes(states)
            matmul = mixed.producer() if mixed is not None else None
            if by is None or by.ndim != 1 or by.dtype != np.float32 or matmul is None or matmul.op_type != "MatMul":
                continue
            weights = matmul.inputs[0].producer() if matmul.inputs[0] is not None else None
            if weights is None or weights.op_type != "Softmax" or mixed is None or len(mixed.uses()) != 1:
                continue
            values = _past_reshapes(matmul.inputs[1])
            if values is not None and _scale_linear(model, values, by):
                assert states is not None
                ir.convenience.replace_all_uses_with(node.outputs[0], states, replace_graph_outputs=True)
                count += 1
                break
    return count


def _past_reshapes(value: ir.Value | None) -> ir.Value | None:
    """What reshapes and transposes made `value` of: (B, N, H * D) <-> (B, H, N, D); stops where something else reads it too."""
    while (
        value is not None
        and (maker := value.producer()) is not None
        and maker.op_type in ("Reshape", "Transpose")
        and len(value.uses()) == 1
    ):
        value = maker.inputs[0]
    return value


def fold_norm_gains(model: ir.Model) -> int:
    """LayerNormalization whose only use is a Mul by a constant per channel (a quantized layer's gain) -> one that scales itself."""
    count = 0
    for node in nodes(model, "Mul"):
        for states, factor in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            by = constant(factor)
            norm = states.producer() if states is not None else None
            if by is None or norm is None or norm.op_type != "LayerNormalization" or len(norm.outputs[0].uses()) != 1:
                continue
            parts = [constant(value) for value in norm.inputs[1:]]
            if any(part is None or part.shape != by.shape or part.dtype != np.float32 for part in parts):
                continue
            for index, part in enumerate(parts, 1):
                assert part is not None
                norm.replace_input_with(index, initializer(model, part * by, f"{name(norm.inputs[index])}_scaled"))
            ir.convenience.replace_all_uses_with(node.outputs[0], norm.outputs[0], replace_graph_outputs=True)
            count += 1
            break
    return count


def _scale_linear(model: ir.Model, output: ir.Value, by: np.ndarray) -> bool:
    """Scale the linear that makes `output` (its only use) by channel; False when it is not one."""
    add = output.producer()
    if add is None or add.op_type != "Add" or len(output.uses()) != 1:
        return False
    for index in (0, 1):
        bias, product = constant(add.inputs[index]), add.inputs[1 - index]
        matmul = product.producer() if product is not None else None
        if bias is None or bias.shape != by.shape or matmul is None or matmul.op_type != "MatMul":
            continue
        if product is None or len(product.uses()) != 1 or not _scale_weight(model, matmul, by):
            continue
        add.replace_input_with(index, initializer(model, bias * by, f"{name(add.inputs[index])}_scaled"))
        return True
    return False


def _scale_weight(model: ir.Model, matmul: ir.Node, by: np.ndarray) -> bool:
    value = matmul.inputs[1]
    weight = constant(value)
    if weight is not None:
        matmul.replace_input_with(1, initializer(model, weight * by, f"{name(value)}_scaled"))
        return True
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.attributes.get_int("axis", 1) != 1:
        return False
    if len(dequantize.outputs[0].uses()) != 1:
        return False
    scales, codes = constant(dequantize.inputs[1]), constant(dequantize.inputs[0])
    if scales is None or scales.shape != by.shape or codes is None or codes.dtype != np.int8:
        return False
    if (by < 0).any() and codes.min() == -128:
        return False
    zero = constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    if zero is not None and zero.any():
        return False
    # A scale must be positive, so the sign moves into the codes.
    if (by < 0).any():
        flipped = codes * np.where(by < 0, -1, 1).astype(np.int8)
        dequantize.replace_input_with(0, initializer(model, flipped, f"{name(dequantize.inputs[0])}_flipped"))
    made = np.maximum(scales * np.abs(by), np.finfo(np.float32).tiny)
    dequantize.replace_input_with(1, initializer(model, made, f"{name(dequantize.inputs[1])}_scaled"))
    return True


def drop_same_casts(model: ir.Model) -> int:
    """Remove Cast to the dtype a value already has, and Identity."""
    count = 0
    for node in nodes(model, "Cast", "Identity"):
        source, output = node.inputs[0], node.outputs[0]
        if source is None or source.dtype is None or source.dtype != output.dtype or output.is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(output, source)
        count += 1
    return count
