"""Single layers, exported and timed: each in the form a whole model has it in, each shape and scheme once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from mmcompress.export.layer import export_layer
from mmcompress.jobs.stopwatch import ExportedStopwatch, stopwatch
from mmcompress.ops.half_quadratic import half_quadratic
from mmcompress.ops.rounding import UINT8
from mmcompress.recipe import Export
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedEmbedding, TiedLinear, quantized


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    linear, table = nn.Linear(32, 48), nn.Embedding(48, 32)
    static = quantized(linear, UINT8)
    static.set_input_grid(torch.tensor(0.03), torch.tensor(128, dtype=torch.uint8))
    packed = QuantizedEmbedding(table)
    return {
        "float": linear,
        "W8A16": quantized(linear, None),
        "W8A8": static,
        "W4A16": PackedLinear(linear, 16, half_quadratic),
        "tied": TiedLinear(nn.Linear(32, 48, bias=False), None, packed),
    }


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("float", {"MatMul", "Add"}),
        ("W8A16", {"DequantizeLinear", "MatMul", "Add"}),
        ("W8A8", {"QuantizeLinear", "DequantizeLinear", "MatMul", "Add"}),
        ("W4A16", {"MatMulNBits", "Add"}),
        ("tied", {"DequantizeLinear", "MatMul"}),
    ],
)
def test_a_layer_alone_is_what_it_is_in_a_model(name: str, operators: set[str], tmp_path: Path) -> None:
    layer = layers()[name]
    export_layer(layer, 5, 32, tmp_path / "layer.onnx")
    graph = onnx.load(tmp_path / "layer.onnx").graph
    assert set(Counter(node.op_type for node in graph.node)) == operators
    integers = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    stored = [tensor for tensor in graph.initializer if tensor.data_type in integers and len(tensor.dims) > 1]
    assert bool(stored) == (name != "float")
    options = onnxruntime.SessionOptions()
    # By default it rounds the inputs of 8-bit weights as it multiplies.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 5, 32), dtype=np.float32)
    (found,) = session.run(None, {"x": x})
    with torch.inference_mode():
        expected = layer(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_onnxruntime_multiplies_integers_as_in_a_model(tmp_path: Path) -> None:
    export_layer(layers()["W8A8"], 5, 32, tmp_path / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what it writes here is for this machine only, it warns
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "layer.onnx", options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert "MatMulIntegerToFloat" in operators
    assert not operators & {"Gemm", "MatMul"}


def test_each_shape_and_scheme_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[str, int]] = []

    def time_it(self: ExportedStopwatch, layer: nn.Module, rows: int) -> float:
        timed.append((type(layer).__name__, rows))
        return float(len(timed))

    monkeypatch.setattr(ExportedStopwatch, "_timed", time_it)
    watch = stopwatch(Export(batch=2, threads=1))
    assert watch("cpu") is watch("cpu")
    first, again = layers(), layers()
    assert [watch("cpu").layer(layer, 5) for layer in first.values()] == [1, 2, 3, 4, 5]
    assert [watch("cpu").layer(layer, 5) for layer in again.values()] == [1, 2, 3, 4, 5]
    assert watch("cpu").layer(first["float"], 6) == 6
    assert watch("cpu").layer(nn.Linear(32, 49), 5) == 7
    assert timed[0] == ("Linear", 10)


def test_a_layer_takes_some_time() -> None:
    watch = stopwatch(Export(threads=1))("cpu")
    small, large = watch.layer(nn.Linear(16, 16), 1), watch.layer(nn.Linear(1024, 1024), 64)
    assert 0 < small < large
