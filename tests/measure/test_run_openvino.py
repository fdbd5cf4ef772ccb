"""OpenVINO computes in the precision asked for, on the inputs it was bound to, and talks to nobody."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mmcompress.errors import MissingError, UsageError
from mmcompress.measure.runners import open_runner
from tests.measure.conftest import pixels

pytest.importorskip("openvino")


def test_fp32_is_not_lowered_behind_one_s_back(tiny_onnx: Path, tiny_vision: torch.nn.Module) -> None:
    import openvino

    runner = open_runner("openvino", tiny_onnx, threads=1)
    assert runner.facts()["precision"] == "fp32"
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bf16 to be lowered to")
    exact = runner.run(pixels(2))["embeddings"]
    low = open_runner("openvino", tiny_onnx, threads=1, precision="bf16").run(pixels(2))["embeddings"]
    assert np.abs(low - exact).max() > 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_quantized_in_no_precision(tiny_onnx: Path, precision: str) -> None:
    import openvino

    if precision.upper() not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip(f"this processor has no {precision}")
    # Asked of the engine: which kernels would quantize at bf16 differs from processor to processor.
    compiled = open_runner("openvino", tiny_onnx, threads=1, precision=precision)._compiled  # type: ignore[attr-defined]
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_a_binding_keeps_its_inputs_whatever_runs_in_between(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = open_runner("openvino", tiny_onnx, threads=1)
    compiled, made = runner._compiled, []

    class Recording:
        def create_infer_request(self) -> Any:
            made.append(compiled.create_infer_request())
            return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_compiled", Recording())
        step = runner.bind(pixels(2, seed=1))
    step()
    expected = made[0].get_output_tensor(0).data.copy()
    runner.run(pixels(2, seed=2))
    step()
    np.testing.assert_array_equal(made[0].get_output_tensor(0).data, expected)


def test_half_precision_files_keep_the_names_of_their_inputs_and_outputs(tmp_path: Path) -> None:
    # fp32 makes the two casts needless; compiling removes them and lumps their names together with the input's.
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 4] x) => (float[batch, 4] embeddings) {
             a_cast = Cast <to: int = 10> (x)
             b_product = MatMul(a_cast, weight)
             embeddings = Cast <to: int = 1> (b_product)
           }"""
    )
    graph.graph.initializer.append(onnx.numpy_helper.from_array(2 * np.eye(4, dtype=np.float16), "weight"))
    onnx.save(graph, tmp_path / "half.onnx")
    import openvino

    openvino.save_model(openvino.Core().read_model(str(tmp_path / "half.onnx")), str(tmp_path / "half.xml"))
    for file in ("half.onnx", "half.xml"):
        runner = open_runner("openvino", tmp_path / file, threads=1)
        inputs = {"x": np.array([[0.5, 1, 2, -4]], np.float32)}
        runner.bind(inputs)()
        np.testing.assert_array_equal(runner.run(inputs)["embeddings"], [[1, 2, 4, -8]])


def test_a_precision_the_processor_lacks_is_missing(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class Plain:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Plain)
    with pytest.raises(MissingError, match="does not compute in bf16"):
        open_runner("openvino", tiny_onnx, precision="bf16")


def test_an_xml_file_loads_and_a_missing_one_is_named(tiny_onnx: Path, tmp_path: Path) -> None:
    import openvino

    openvino.save_model(openvino.Core().read_model(str(tiny_onnx)), str(tmp_path / "t.xml"), compress_to_fp16=False)
    expected = open_runner("openvino", tiny_onnx, threads=1).run(pixels(2))["embeddings"]
    found = open_runner("openvino", tmp_path / "t.xml", threads=1).run(pixels(2))["embeddings"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(UsageError, match=r"absent\.xml"):
        open_runner("openvino", tmp_path / "absent.xml")


def test_nothing_is_sent_anywhere(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection was tried")

    for way in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, way, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    open_runner("openvino", tiny_onnx, threads=1).run(pixels(1))
