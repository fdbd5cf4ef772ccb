"""Multiply-accumulates of an ONNX file at given input shapes, counted node by node from the file itself.

Same convention as `macs`: one multiply with its add, matrix products, convolutions and attention's two products. Shapes
come from onnx's own inference with the input shapes filled in; what it cannot infer (operators outside the standard)
is found by running the graph once in ONNX Runtime on zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmcompress.errors import MissingError, UsageError
from mmcompress.export.four_bit_floats import blank_four_bit_floats
from mmcompress.measure.macs import MacCount
from mmcompress.measure.onnx_graph import every_node, operator_name, read_graph, subgraphs
from mmcompress.measure.onnx_rules import NO_RULE, RULES

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
_LOOPS = ("Loop", "Scan")


def onnx_macs(path: str | Path, shapes: Mapping[str, Sequence[int]] | None = None) -> MacCount:
    """MACs of the graph in `path` at the input shapes `shapes` (by input name; inputs of fixed shape may be left out).

    `by_module` is empty: a graph has no modules. Of an If the dearer branch counts; products inside loops are reported
    as uncounted. Raises UsageError for an unreadable file, an unknown input, or an input whose shape is left open, and
    MissingError when a shape can only be found by running the graph and onnxruntime is not installed.
    """
    import onnx
    import onnx.inliner

    model = read_graph(path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _fix_inputs(model.graph, {name: tuple(shape) for name, shape in (shapes or {}).items()})
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    known: dict[str, Shape] = {}
    _collect_shapes(inferred, known)
    unknown = {name for node in inferred.node for name in _needed(node)} - known.keys()
    if unknown:
        known |= _shapes_by_running(model, path, unknown)
    by_op: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    _count(inferred, known, by_op, uncounted)
    return MacCount(sum(by_op.values()), dict(by_op), {}, dict(uncounted))


def _fix_inputs(graph: onnx.GraphProto, shapes: dict[str, Shape]) -> None:
    """Write `shapes` into the inputs, and drop recorded shapes that were made for others."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in weights}
    for name in shapes.keys() - inputs.keys():
        raise UsageError(f"the graph has no input '{name}'", hint="inputs: " + ", ".join(inputs))
    for name, value in inputs.items():
        dims = value.type.tensor_type.shape.dim
        if name in shapes:
            if len(dims) != len(shapes[name]):
                raise UsageError(
                    f"input '{name}' has {len(dims)} dimensions, the shape given has {len(shapes[name])}",
                    hint="give one number per dimension",
                )
            for dim, size in zip(dims, shapes[name], strict=True):
                if dim.HasField("dim_value") and dim.dim_value != size:
                    raise UsageError(
                        f"input '{name}' is {dim.dim_value} where the shape given says {size}",
                        hint="only the open dimensions can be chosen",
                    )
                dim.dim_value = size
        elif any(not dim.HasField("dim_value") for dim in dims):
            raise UsageError(
                f"input '{name}' has open dimensions", hint=f"give its shape, such as {{'{name}': (1, …)}}"
            )
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _collect_shapes(graph: onnx.GraphProto, known: dict[str, Shape]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if not value.type.tensor_type.HasField("shape"):
            continue
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            known[value.name] = tuple(dim.dim_value for dim in dims)
    for tensor in graph.initializer:
        known[tensor.name] = tuple(tensor.dims)
    for node in graph.node:
        for inner in subgraphs(node):
            _collect_shapes(inner, known)


def _shapes_by_running(model: onnx.ModelProto, path: str | Path, names: set[str]) -> dict[str, Shape]:
    """Shapes of the tensors `names` from one run on zeros."""
    import numpy as np
    import onnx

    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(
            f"the shape of '{min(names)}' in '{path}' can only be found by running the graph",
            hint="pip install 'mmcompress[cpu]'",
        ) from error
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    onnx.load_external_data_for_model(whole, str(Path(path).parent))
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    blank_four_bit_floats(whole)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        dtype = onnx.helper.tensor_dtype_to_np_dtype(
            next(v for v in model.graph.input if v.name == value.name).type.tensor_type.elem_type
        )
        feeds[value.name] = np.zeros(value.shape, dtype)
    return {
        name: tuple(array.shape) for name, array in zip(sorted(names), session.run(sorted(names), feeds), strict=True)
    }


def _needed(node: onnx.NodeProto) -> list[str]:
    """Tensors whose shapes the node's rule looks at."""
    rule = RULES.get(operator_name(node))
    if rule is None:
        return []
    return [node.input[i] for i in rule.inputs if i < len(node.input) and node.input[i]] + [
        node.output[i] for i in rule.outputs
    ]


def _count(graph: onnx.GraphProto, known: dict[str, Shape], by_op: Counter[str], uncounted: Counter[str]) -> None:
    for node in graph.node:
        name, inner = operator_name(node), subgraphs(node)
        if node.op_type in _LOOPS:
            products = RULES.keys() | NO_RULE
            uncounted.update(
                operator_name(n) for body in inner for n in every_node(body) if operator_name(n) in products
            )
        elif inner:
            branches = [Counter[str]() for _ in inner]
            for body, branch in zip(inner, branches, strict=True):
                _count(body, known, branch, uncounted)
            dearest = max(branches, key=lambda branch: branch.total())
            by_op.update(dearest)
        elif name in NO_RULE:
            uncounted[name] += 1
        elif name in RULES:
            for needed in _needed(node):
                if needed not in known:
                    raise UsageError(
                        f"the shape of '{needed}' cannot be inferred", hint="give the shape of every input"
                    )
            by_op[name] += RULES[name].macs(
                node, [known.get(part, ()) for part in node.input], [known.get(part, ()) for part in node.output]
            )
