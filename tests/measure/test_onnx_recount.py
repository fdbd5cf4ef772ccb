"""The recount over a graph agrees with the recount of the module it came from, and with counts made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mmcompress.errors import UsageError
from mmcompress.measure.macs import macs
from mmcompress.measure.onnx_graph import external_files, onnx_initializer_dtypes, onnx_op_histogram
from mmcompress.measure.onnx_recount import onnx_macs

FLOAT = TensorProto.FLOAT


def graph_file(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[Any, ...]],
    weights: dict[str, np.ndarray] | None = None,
    output: str = "y",
    opset: int = 21,
    dtype: int = FLOAT,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(output, FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "made.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), str(path))
    return path


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_graph_and_module_agree(batch: int, tiny_onnx: Path, tiny_vision: torch.nn.Module) -> None:
    found = onnx_macs(tiny_onnx, {"pixel_values": (batch, 3, 8, 8)})
    assert found.total == macs(tiny_vision, torch.zeros(batch, 3, 8, 8)).total
    assert found.total == sum(found.by_op.values())
    assert found.uncounted == {}


ATTENTION = 2 * 6 * 9 * (8 + 8)  # B*N*S*(C + Cv) with B=2, N=6, S=9, C=8


@pytest.mark.parametrize(
    ("node", "shapes", "expected"),
    [
        (("MatMul", {}, ""), [(2, 3, 8), (8, 5)], 2 * 3 * 8 * 5),
        (("MatMul", {}, ""), [(8,), (8, 5)], 8 * 5),
        (("MatMul", {}, ""), [(4, 8), (8,)], 4 * 8),
        (("MatMul", {}, ""), [(7, 1, 3, 8), (4, 8, 5)], 7 * 4 * 3 * 8 * 5),
        (("Gemm", {"transA": 1, "transB": 1}, ""), [(8, 3), (5, 8)], 3 * 8 * 5),
        (("Conv", {"group": 2, "strides": [2, 2]}, ""), [(1, 4, 8, 8), (6, 2, 2, 2)], 6 * 4 * 4 * 2 * 2 * 2),
        (("ConvTranspose", {"strides": [2, 2]}, ""), [(1, 4, 3, 3), (4, 6, 2, 2)], 4 * 9 * 6 * 4),
        (("Einsum", {"equation": "bnc,mc->bnm"}, ""), [(2, 3, 8), (5, 8)], 2 * 3 * 8 * 5),
        (("Einsum", {"equation": "...ij,...jk->...ik"}, ""), [(7, 2, 3, 8), (2, 8, 5)], 7 * 2 * 3 * 8 * 5),
        (("Einsum", {"equation": "bn,bn->bn"}, ""), [(2, 3), (2, 3)], 0),
        (("Attention", {}, ""), [(2, 2, 6, 4), (2, 2, 9, 4), (2, 2, 9, 4)], ATTENTION),
        (("Attention", {"q_num_heads": 2, "kv_num_heads": 2}, ""), [(2, 6, 8), (2, 9, 8), (2, 9, 8)], ATTENTION),
        (("Attention", {"q_num_heads": 2, "kv_num_heads": 1}, ""), [(2, 6, 8), (2, 9, 4), (2, 9, 4)], ATTENTION),
        (("FusedMatMul", {"transB": 1}, "com.microsoft"), [(2, 3, 8), (2, 5, 8)], 2 * 3 * 8 * 5),
        (("MultiHeadAttention", {"num_heads": 2}, "com.microsoft"), [(2, 6, 8), (2, 9, 8), (2, 9, 8)], ATTENTION),
        (
            ("Attention", {"num_heads": 2}, "com.microsoft"),
            [(2, 6, 8), (8, 24), (24,)],
            2 * 6 * 8 * 24 + 2 * 6 * 6 * (8 + 8),
        ),
    ],
)
def test_one_operator_by_hand(
    tmp_path: Path, node: tuple[str, dict[str, Any], str], shapes: list[tuple[int, ...]], expected: int
) -> None:
    op, attributes, domain = node
    names = [f"x{i}" for i in range(len(shapes))]
    made = helper.make_node(op, names, ["y"], domain=domain, **attributes)
    path = graph_file(tmp_path, [made], dict(zip(names, shapes, strict=True)), opset=23)
    assert onnx_macs(path).total == expected


def test_integer_products_count_like_the_float_ones(tmp_path: Path) -> None:
    weights = {"w": np.ones((8, 5), np.int8), "z": np.zeros((), np.uint8)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=FLOAT),
    ]
    path = graph_file(tmp_path, nodes, {"x": ("batch", 3, 8)}, weights)
    assert onnx_macs(path, {"x": (2, 3, 8)}).by_op == {"MatMulInteger": 2 * 3 * 8 * 5}


def test_quantized_operators_look_at_the_right_inputs(tmp_path: Path) -> None:
    scale, zero = np.float32(0.1).reshape(()), np.zeros((), np.uint8)
    weights = {"s": np.asarray(scale), "z": zero, "w": np.ones((8, 5), np.uint8), "k": np.ones((6, 3, 2, 2), np.uint8)}
    product = helper.make_node("QLinearMatMul", ["x", "s", "z", "w", "s", "z", "s", "z"], ["y"])
    assert onnx_macs(graph_file(tmp_path, [product], {"x": (2, 3, 8)}, weights, dtype=TensorProto.UINT8)).total == 240
    convolution = helper.make_node("QLinearConv", ["x", "s", "z", "k", "s", "z", "s", "z"], ["y"], strides=[2, 2])
    found = onnx_macs(graph_file(tmp_path, [convolution], {"x": (1, 3, 4, 4)}, weights, dtype=TensorProto.UINT8))
    assert found.total == 6 * 2 * 2 * 3 * 2 * 2


def test_a_shape_behind_an_operator_outside_the_standard_is_found_by_running(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    weights = {"w": np.ones((8, 5), np.float32)}
    nodes = [
        helper.make_node("BiasGelu", ["x", "b"], ["g"], domain="com.microsoft"),
        helper.make_node("MatMul", ["g", "w"], ["y"]),
    ]
    path = graph_file(tmp_path, nodes, {"x": ("batch", 3, 8), "b": (8,)}, weights)
    assert onnx_macs(path, {"x": (2, 3, 8)}).total == 2 * 3 * 8 * 5


def test_the_dearer_branch_counts_and_a_loop_is_reported(tmp_path: Path) -> None:
    def branch(width: int) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.ones((8, width), np.float32), f"w{width}")
        node = helper.make_node("MatMul", ["x", f"w{width}"], [f"b{width}"])
        value = helper.make_tensor_value_info(f"b{width}", FLOAT, None)
        return helper.make_graph([node], f"to{width}", [], [value], [weight])

    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["choice"], to=TensorProto.BOOL),
        helper.make_node("If", ["choice"], ["y"], then_branch=branch(3), else_branch=branch(5)),
    ]
    path = graph_file(tmp_path, nodes, {"x": (2, 8)})
    assert onnx_macs(path).total == 2 * 8 * 5
    assert onnx_op_histogram(path)["MatMul"] == 2

    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["carried", "square"], ["product"]),
            helper.make_node("Unsqueeze", ["product", "n0"], ["step"]),
            helper.make_node("GRU", ["step", "w", "r"], ["", "states"], hidden_size=8),
            helper.make_node("Squeeze", ["states", "n0"], ["next"]),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ()),
            helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("carried", FLOAT, (2, 8)),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("next", FLOAT, (2, 8)),
        ],
    )
    gates = np.ones((1, 24, 8), np.float32)
    weights = {"square": np.eye(8, dtype=np.float32), "n": np.array(4), "yes": np.array(True)}
    weights |= {"n0": np.array([0]), "w": gates, "r": gates}
    looped = graph_file(
        tmp_path, [helper.make_node("Loop", ["n", "yes", "x"], ["y"], body=body)], {"x": (2, 8)}, weights
    )
    found = onnx_macs(looped)
    assert (found.total, found.uncounted) == (0, {"MatMul": 1, "GRU": 1})


def test_recurrent_layers_are_reported_as_uncounted(tmp_path: Path) -> None:
    weights = {"w": np.ones((1, 12, 8), np.float32), "r": np.ones((1, 12, 4), np.float32)}
    node = helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=4)
    found = onnx_macs(graph_file(tmp_path, [node], {"x": (5, 2, 8)}, weights))
    assert (found.total, found.uncounted) == (0, {"GRU": 1})


def test_dtypes_are_read_from_the_file_and_four_bits_are_packed(tmp_path: Path) -> None:
    weights = {"w": np.ones((8, 6), np.int8), "s": np.ones(6, np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    path = graph_file(tmp_path, nodes, {"x": (2, 8)}, weights)
    assert onnx_initializer_dtypes(path) == {"INT8": 48, "FLOAT": 24}
    assert onnx_op_histogram(path) == {"DequantizeLinear": 1, "MatMul": 1}
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("four", TensorProto.INT4, (3,), [1, 2, 3]))
    model.graph.node.append(
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(5, np.float16)))
    )
    onnx.save(model, str(path))
    assert onnx_initializer_dtypes(path) == {"INT8": 48, "FLOAT": 24, "FLOAT16": 10, "INT4": 2}


def test_external_weights_count_without_being_there(
    tiny_onnx: Path, tiny_vision: torch.nn.Module, tmp_path: Path
) -> None:
    stored = sum(parameter.numel() * 4 for parameter in tiny_vision.parameters())
    assert onnx_initializer_dtypes(tiny_onnx)["FLOAT"] == pytest.approx(stored, abs=16)
    assert [file.name for file in external_files(tiny_onnx)] == ["tiny.onnx.data"]
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(tiny_onnx.read_bytes())
    assert onnx_initializer_dtypes(alone) == onnx_initializer_dtypes(tiny_onnx)
    with pytest.raises(UsageError, match=r"needs 'tiny\.onnx\.data'"):
        external_files(alone)


def test_bad_files_and_shapes_are_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ONNX file"):
        onnx_macs(tmp_path / "absent.onnx")
    for name, content in {"text.onnx": b"not a graph at all", "empty.onnx": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name}' is not an ONNX file"):
            onnx_macs(tmp_path / name)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(tiny_onnx.read_bytes()[:-200])
    with pytest.raises(UsageError, match="is not an ONNX file"):
        onnx_macs(cut)
    with pytest.raises(UsageError, match="'pixel_values' has open dimensions"):
        onnx_macs(tiny_onnx)
    with pytest.raises(UsageError, match="no input 'pixels'"):
        onnx_macs(tiny_onnx, {"pixels": (1, 3, 8, 8)})
    with pytest.raises(UsageError, match="is 8 where the shape given says 9"):
        onnx_macs(tiny_onnx, {"pixel_values": (1, 3, 8, 9)})
    with pytest.raises(UsageError, match="has 4 dimensions"):
        onnx_macs(tiny_onnx, {"pixel_values": (1, 3)})
