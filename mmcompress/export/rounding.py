"""Taking the rounding of activations out of a graph and out of its torch module, so that the rest can be compared strictly.

Two correct engines disagree on a quantized network: a value within 1e-6 of the middle between two integers goes up in one
and down in the other, that step is as large as the quantization error itself, and it spreads through the layers behind
it. So a quantized graph is checked in three parts: everything but the rounding to float accuracy, the rounding's own
parameters for equality, and the whole within a loose cosine. Products that round their inputs at run time (MatMulNBits) have no
such parameters: they are told not to for the first part. Nor has a cache that keeps integers: for the first part it keeps floats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from mmcompress.errors import GateFailed
from mmcompress.export.running import run_torch
from mmcompress.export.trace import Traced
from mmcompress.parts import BATCH
from mmcompress.surgery.quantized_base import Quantized
from mmcompress.surgery.rounded_cache import codes_unrounded
from mmcompress.surgery.rounding_operators import FLOAT_INPUTS, ROUNDED_INPUTS

ROUNDING = ("MatMulNBits", "QMoE")
"""Operators that may round their inputs as they multiply."""

_ROUNDING_BY = ("input_scale", "tokens", "output_scale")
"""Attributes of a layer that rounds, in whose absence it does not."""

Grid = tuple[float, int]
"""(scale, zero point)."""


def unrounded(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which activations pass QuantizeLinear, DequantizeLinear and products unrounded; weights stay integers.

    Integers that the graph is given or gives out are floats then, not rounded either: see `unrounded_inputs`.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    _pass_codes(made)
    source = {node.output[0]: node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    passed = {
        node.output[0]: source[node.input[0]]
        for node in made.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in source
    }
    kept = [
        node for node in made.graph.node if node.op_type != "QuantizeLinear" and not (set(node.output) & set(passed))
    ]
    for node in kept:
        if node.op_type in ROUNDING:
            level(node).i = FLOAT_INPUTS
        if node.op_type == "QMoE":
            _without_blocks(node, made.graph)
        for index, name in enumerate(node.input):
            while name in passed:
                name = passed[name]
            node.input[index] = name
    del made.graph.node[:]
    made.graph.node.extend(kept)
    return made


def unrounded_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs as `unrounded` graphs take them."""
    return {name: value.float() if value.dtype == torch.int8 else value for name, value in inputs.items()}


def _pass_codes(graph: onnx.ModelProto) -> None:
    """Let codes of a cache go through the graph as floats: they come in, are made of new tokens, put together, and go out."""
    codes = _codes(graph)
    if not codes:
        return
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        makes, reads = node.op_type == "QuantizeLinear", node.op_type == "DequantizeLinear"
        if (makes and node.output[0] in codes) or (reads and node.input[0] in codes):
            # Given and kept as float32; what is computed with has the type of the scale.
            kind = onnx.TensorProto.FLOAT if makes else kinds[node.input[1]]
            del node.input[1:], node.attribute[:]
            node.op_type = "Cast"
            node.attribute.append(onnx.helper.make_attribute("to", kind))
    for value in (*graph.graph.input, *graph.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT8:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del graph.graph.value_info[:]  # they say integers


def _codes(graph: onnx.ModelProto) -> set[str]:
    """Return the values that are a cache's codes: those the graph is given, those it makes of new tokens, and what is cut of both.

    What is made for a product alone is dequantized at once.
    """
    found = {value.name for value in graph.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.INT8}
    if not found:
        return found
    kept = {value.name for value in graph.graph.output}
    kept |= {name for node in graph.graph.node if node.op_type != "DequantizeLinear" for name in node.input}
    for node in graph.graph.node:  # in the order they run
        makes = node.op_type == "QuantizeLinear" and node.output[0] in kept
        if makes or (node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Shape") and found & set(node.input)):
            found |= set(node.output)
    return found


def rounds(graph: onnx.ModelProto) -> bool:
    """Return whether activations are rounded anywhere, by the graph itself or by a product that may."""
    return any(
        node.op_type == "QuantizeLinear" or (node.op_type in ROUNDING and level(node).i == ROUNDED_INPUTS)
        for node in graph.graph.node
    )


def _without_blocks(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """Let a QMoE of 8 bits multiply floats: in blocks it rounds its inputs whatever it is told. Its rows have one scale each."""
    given = {attribute.name: attribute for attribute in node.attribute}
    if given["expert_weight_bits"].i != 8 or "block_size" not in given:
        return
    node.attribute.remove(given["block_size"])
    scales = {tensor.name: tensor for tensor in graph.initializer}
    for place in (3, 6):
        held = scales[node.input[place]]
        rows = onnx.numpy_helper.to_array(held)[..., 0]
        held.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(rows), held.name))


def level(node: onnx.NodeProto) -> onnx.AttributeProto:
    """Return the attribute of one of `ROUNDING` that says how exact it is."""
    return next(attribute for attribute in node.attribute if attribute.name == "accuracy_level")


@contextlib.contextmanager
def no_rounding(module: Traced) -> Iterator[None]:
    """While active, the module's quantized layers round neither inputs nor outputs, and its cache keeps what it is given."""
    held: dict[Any, dict[str, Any]] = {
        layer: {name: value for name in _ROUNDING_BY if (value := getattr(layer, name, None)) is not None}
        for layer in rounding_layers(module)
    }
    for layer, kept in held.items():
        for name in kept:
            setattr(layer, name, None)
    try:
        with codes_unrounded():
            yield
    finally:
        for layer, kept in held.items():
            for name, value in kept.items():
                setattr(layer, name, value)


def check_grids(module: Traced, graph: onnx.ModelProto, used: Collection[str] | None = None) -> None:
    """Raise GateFailed unless activations are rounded with the scales and zero points of the torch module, and no others.

    `used`: see `torch_grids`.
    """
    want, got = torch_grids(module, used), graph_grids(graph)
    if want != got:
        odd = sorted(want ^ got)[0]
        where = "the torch model" if odd in want else "the exported graph"
        raise GateFailed(
            f"activations of the {module.part.name} part are rounded differently: only {where} has scale {odd[0]:.6g}, "
            f"zero point {odd[1]} ({len(want)} in torch, {len(got)} in the graph)",
            hint="report it with the model's config and the versions of torch and onnxscript",
        )


def torch_grids(module: Traced, used: Collection[str] | None = None) -> set[Grid]:
    """Return the grids of the quantized layers that run when the part does.

    `used`: names of the tensors that its outputs are computed from; None: of all. A layer that runs for nothing is in no graph.
    """
    inputs = module.example({BATCH: 1, **module.part.traced})
    ran: list[Quantized] = []
    handles = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in rounding_layers(module)]
    try:
        run_torch(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if used is not None:
        # A layer that shares its weight has the scales of another one.
        scales = {id(buffer) for name, buffer in module.model.named_buffers() if name in used}
        ran = [layer for layer in ran if id(layer.weight_scale) in scales]
    return {grid for layer in ran for grid in (layer.input_grid(), layer.output_grid()) if grid is not None}


def graph_grids(graph: onnx.ModelProto) -> set[Grid]:
    """Return the grids of the graph's QuantizeLinear nodes, but for those that make a cache's codes."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}

    def value(name: str) -> float:
        return float(onnx.numpy_helper.to_array(constants[name]).astype(np.float64))

    codes = _codes(graph)
    return {
        (value(node.input[1]), int(value(node.input[2])) if len(node.input) > 2 else 0)
        for node in graph.graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] not in codes
    }


def rounding_layers(module: Traced) -> list[Quantized]:
    """Return the layers that round their inputs or outputs in torch."""
    layers = [layer for layer in module.model.modules() if isinstance(layer, Quantized)]
    return [layer for layer in layers if any(getattr(layer, name, None) is not None for name in _ROUNDING_BY)]
