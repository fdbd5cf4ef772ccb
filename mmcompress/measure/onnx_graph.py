"""What an ONNX file holds, read from the file: operators, the dtypes its weights really have, the files beside it.

Nothing here reads weights: a graph of gigabytes is looked at in the time its structure takes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmcompress.errors import UsageError

if TYPE_CHECKING:
    import onnx

_PACKED = {2: ("UINT2", "INT2"), 4: ("UINT4", "INT4", "FLOAT4E2M1")}
"""Bits of the dtypes that are stored several to a byte."""


def onnx_op_histogram(path: str | Path) -> dict[str, int]:
    """How often each operator occurs, subgraphs and functions included; operators outside the standard as domain.Name."""
    model = read_graph(path)
    nodes = [*every_node(model.graph), *(node for function in model.functions for node in function.node)]
    return dict(Counter(operator_name(node) for node in nodes).most_common())


def onnx_initializer_dtypes(path: str | Path) -> dict[str, int]:
    """Bytes of the stored tensors per dtype, such as {"INT8": 9000, "FLOAT": 1200}; constants in nodes included.

    Four-bit dtypes are counted as packed, two to a byte. External data is counted without being read.
    """
    model = read_graph(path)
    found: Counter[str] = Counter()
    for tensor in _tensors(model):
        name, bits = _dtype(tensor.data_type)
        found[name] += (math.prod(tensor.dims) * bits + 7) // 8
    return dict(found.most_common())


def external_files(path: str | Path) -> list[Path]:
    """Files beside the graph that hold its external tensors. Raises UsageError where one of them is missing."""
    places: dict[str, None] = {}
    for tensor in _tensors(read_graph(path)):
        for entry in tensor.external_data:
            if entry.key == "location":
                places[entry.value] = None
    files = [Path(path).parent / place for place in places]
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"'{path}' needs '{file.name}', which is not beside it",
                hint="copy both files, or export the model again",
            )
    return files


def read_graph(path: str | Path) -> onnx.ModelProto:
    """Load the graph without its external data. Raises UsageError for a missing file or one that is not ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    if not Path(path).is_file():
        raise UsageError(f"no ONNX file at '{path}'", hint="check the path, or make one with 'mmc export --to onnx'")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise UsageError(f"'{path}' is not an ONNX file, or it is cut short", hint="export the model again") from error
    if not model.graph.node:
        raise UsageError(f"'{path}' is not an ONNX file: it holds no graph", hint="export the model again")
    return model


def operator_name(node: onnx.NodeProto) -> str:
    """`MatMul` for a standard operator, `com.microsoft.QAttention` for another domain's."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches of an If, the body of a Loop or Scan; empty for every other node."""
    return [inner for attribute in node.attribute for inner in (attribute.g, *attribute.graphs) if inner.node]


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs after the node that holds them."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from every_node(inner)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constants, everywhere in the model."""

    def of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for node in graph.node:
            yield from of_node(node)

    def of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in subgraphs(node):
            yield from of_graph(inner)

    yield from of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from of_node(node)


def _dtype(number: int) -> tuple[str, int]:
    """Name and bits per element of an ONNX dtype."""
    import numpy as np
    import onnx

    name = onnx.TensorProto.DataType.Name(number)
    for bits, names in _PACKED.items():
        if name in names:
            return name, bits
    return name, 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)).itemsize


def rounded_blocks(model: onnx.ModelProto) -> int:
    """Return in how small blocks the file's products may round their inputs to 8 bits; 0 where none may."""
    sizes = [
        attributes["block_size"]
        for node in every_node(model.graph)
        if node.op_type in ("MatMulNBits", "QMoE")
        for attributes in [{attribute.name: attribute.i for attribute in node.attribute}]
        if attributes.get("accuracy_level") == 4 and "block_size" in attributes
    ]
    return min(sizes, default=0)
