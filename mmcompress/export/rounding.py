"""Taking the rounding of activations out of a graph and out of its torch module, so that the rest can be compared strictly.

Two correct engines disagree on a quantized network: a value within 1e-6 of the middle between two integers goes up in one
and down in the other, that step is as large as the quantization error itself, and it spreads through the layers behind
it. So a quantized graph is checked in three parts: everything but the rounding to float accuracy, the rounding's own
parameters for equality, and the whole within a loose cosine. Products that round their inputs at run time (MatMulNBits) have no
such parameters: they are told not to for the first part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import onnx

from mmcompress.errors import GateFailed
from mmcompress.export.running import run_torch
from mmcompress.export.trace import Traced
from mmcompress.parts import BATCH
from mmcompress.surgery.quantized_base import Quantized
from mmcompress.surgery.rounding_operators import FLOAT_INPUTS, ROUNDED_INPUTS

Grid = tuple[float, int]
"""(scale, zero point)."""


def unrounded(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which activations pass QuantizeLinear, DequantizeLinear and MatMulNBits unrounded; weights stay integers."""
    made = onnx.ModelProto()
    made.CopyFrom(graph)
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
        if node.op_type == "MatMulNBits":
            level(node).i = FLOAT_INPUTS
        for index, name in enumerate(node.input):
            while name in passed:
                name = passed[name]
            node.input[index] = name
    del made.graph.node[:]
    made.graph.node.extend(kept)
    return made


def rounds(graph: onnx.ModelProto) -> bool:
    """Return whether activations are rounded anywhere, by the graph itself or by a product that may."""
    return any(
        node.op_type == "QuantizeLinear" or (node.op_type == "MatMulNBits" and level(node).i == ROUNDED_INPUTS)
        for node in graph.graph.node
    )


def level(node: onnx.NodeProto) -> onnx.AttributeProto:
    """Return the attribute of a MatMulNBits that says how exact it is."""
    return next(attribute for attribute in node.attribute if attribute.name == "accuracy_level")


@contextlib.contextmanager
def no_rounding(module: Traced) -> Iterator[None]:
    """While active, the module's quantized layers take their inputs as they come."""
    held: dict[Any, dict[str, Any]] = {
        layer: {name: value for name in ("input_scale", "tokens") if (value := getattr(layer, name, None)) is not None}
        for layer in rounding_layers(module)
    }
    for layer, kept in held.items():
        for name in kept:
            setattr(layer, name, None)
    try:
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
    return {grid for layer in ran if (grid := layer.input_grid()) is not None}


def graph_grids(graph: onnx.ModelProto) -> set[Grid]:
    """Return the grids of the graph's QuantizeLinear nodes."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}

    def value(name: str) -> float:
        return float(onnx.numpy_helper.to_array(constants[name]).astype(np.float64))

    return {
        (value(node.input[1]), int(value(node.input[2])) if len(node.input) > 2 else 0)
        for node in graph.graph.node
        if node.op_type == "QuantizeLinear"
    }


def rounding_layers(module: Traced) -> list[Quantized]:
    """Return the layers that round their inputs in torch."""
    layers = [layer for layer in module.model.modules() if isinstance(layer, Quantized)]
    return [layer for layer in layers if getattr(layer, "input_scale", None) is not None or layer.tokens is not None]
