"""Constants of an exported graph: what can be computed from them now, and integers that need not be stored twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnxscript import ir


def split_constants(model: ir.Model) -> int:
    """Split constants now: packed q/k/v weights of nn.MultiheadAttention."""
    count = 0
    for node in nodes(model, "Split"):
        source = node.inputs[0]
        axis = node.attributes.get_int("axis", 0)
        whole = constant(source)
        if whole is None or any(output.shape is None or not output.shape.is_static() for output in node.outputs):
            continue
        sizes = [int(output.shape[axis]) for output in node.outputs if output.shape is not None]  # type: ignore[arg-type]
        for output, part in zip(node.outputs, np.split(whole, np.cumsum(sizes)[:-1], axis), strict=True):
            ir.convenience.replace_all_uses_with(output, initializer(model, part, str(output.name)))
        count += 1
    return count


def transpose_constants(model: ir.Model) -> int:
    """Transpose constants now: the exporter leaves large ones, which are the integer weights of linears."""
    count = 0
    for node in nodes(model, "Transpose"):
        whole = constant(node.inputs[0])
        if whole is None:
            continue
        turned = np.ascontiguousarray(whole.transpose(node.attributes["perm"].as_ints()))
        made = initializer(model, turned, f"{name(node.inputs[0])}_transposed")
        ir.convenience.replace_all_uses_with(node.outputs[0], made)
        count += 1
    return count


def reshape_constants(model: ir.Model) -> int:
    """Reshape and repeat packed weights and their scales now: the exporter leaves large constants as they are.

    No others: what a mask or a table of positions is repeated to can be far larger than itself.
    """
    count = 0
    for node in nodes(model, "Reshape", "Expand"):
        if any(use.node.op_type != "MatMulNBits" for use in node.outputs[0].uses()):
            continue
        whole, shape = constant(node.inputs[0]), node.outputs[0].shape
        if whole is None or shape is None or not shape.is_static():
            continue
        sizes = [int(size) for size in shape]  # type: ignore[arg-type]
        turned = whole.reshape(sizes) if node.op_type == "Reshape" else np.broadcast_to(whole, sizes).copy()
        made = initializer(model, turned, f"{name(node.inputs[0])}_shaped")
        ir.convenience.replace_all_uses_with(node.outputs[0], made)
        count += 1
    return count


def share_tables(model: ir.Model) -> int:
    """Look rows up as columns of the transposed table where an output layer holds the same integers: tied, they are stored once."""
    count = 0
    for node in nodes(model, "Gather", "GatherND"):
        table, indices = node.inputs[:2]
        rows, shape = constant(table), node.outputs[0].shape
        if rows is None or rows.ndim != 2 or rows.dtype not in (np.int8, np.uint8) or indices is None or shape is None:
            continue
        twin = _transposed_twin(model, table, rows)
        several = (
            node.attributes.get_int("axis", 0)
            if node.op_type == "Gather"
            else indices.shape is None or indices.shape[-1] != 1
        )
        if twin is None or several:
            continue
        made = []
        if node.op_type == "GatherND":
            last = initializer(model, np.array([-1]), f"{node.name}_axis")
            made.append(ir.node("Squeeze", [indices, last], name=f"{node.name}_places"))
            indices = made[-1].outputs[0]
        made.append(ir.node("Gather", [twin, indices], {"axis": 1}, name=f"{node.name}_columns"))
        order = [*range(1, len(shape)), 0]
        made.append(ir.node("Transpose", [made[-1].outputs[0]], {"perm": order}, name=f"{node.name}_rows"))
        made[-1].outputs[0].shape, made[-1].outputs[0].type = shape, node.outputs[0].type
        model.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(node.outputs[0], made[-1].outputs[0])
        count += 1
    return count


def _transposed_twin(model: ir.Model, table: ir.Value | None, rows: np.ndarray) -> ir.Value | None:
    """Return the initializer that holds `rows` transposed and is not `table` itself."""
    for value in model.graph.initializers.values():
        if value is table or value.const_value is None or tuple(value.const_value.shape) != rows.shape[::-1]:
            continue
        other = constant(value)
        if other is not None and other.dtype == rows.dtype and np.array_equal(other, rows.T):
            return value
    return None


def nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these types, safe against changes while they are visited."""
    yield from [node for node in model.graph if node.op_type in op_types]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the value of an initializer, None for anything else."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def initializer(model: ir.Model, array: np.ndarray, label: str) -> ir.Value:
    """Add an initializer, under another name where this one is taken."""
    while label in model.graph.initializers:
        label += "_"
    tensor = ir.tensor(array, name=label)
    made = ir.Value(name=label, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(made)
    return made


def name(value: ir.Value | None) -> str:
    """Return the name of a value, "" without one."""
    return str(value.name) if value is not None else ""
