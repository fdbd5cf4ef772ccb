"""Every engine keeps one contract: the same numbers, the same errors, and facts that tell what really ran."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mmcompress.errors import MissingError, UsageError
from mmcompress.measure import run_onnxruntime, run_torch
from mmcompress.measure.runner import Declared, Runner, fitted
from mmcompress.measure.runners import RUNNERS, open_runner
from tests.measure.conftest import pixels

CPU_ENGINES = ("torch", "onnxruntime", "openvino")


@pytest.fixture(params=CPU_ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    spec = RUNNERS[request.param]
    if spec.available():
        pytest.skip(str(spec.available()))
    return str(request.param)


@pytest.fixture
def runner(engine: str, tiny_onnx: Path, tiny_vision: torch.nn.Module) -> Iterator[Runner]:
    opened = open_runner(engine, tiny_vision if engine == "torch" else tiny_onnx, threads=1)
    yield opened
    opened.close()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_all_engines_give_the_module_s_numbers(runner: Runner, tiny_vision: torch.nn.Module, batch: int) -> None:
    inputs = pixels(batch)
    with torch.no_grad():
        expected = tiny_vision(torch.from_numpy(inputs["pixel_values"])).numpy()
    found = runner.run(inputs)
    assert found.keys() == {"embeddings"}
    np.testing.assert_allclose(found["embeddings"], expected, atol=2e-6)


def test_facts_say_what_ran(runner: Runner, engine: str) -> None:
    facts = runner.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["engine"], runner.name) == (engine, engine)
    assert (facts["device"], runner.device, facts["threads"]) == ("cpu", "cpu", 1)
    assert facts["version"]
    assert facts["precision"]


def test_results_stay_what_they_were_after_another_run(runner: Runner) -> None:
    first = runner.run(pixels(2, seed=1))["embeddings"]
    kept = first.copy()
    runner.run(pixels(2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_two_bindings_of_one_runner_do_not_disturb_each_other(runner: Runner) -> None:
    small, large = runner.bind(pixels(1)), runner.bind(pixels(4))
    for step in (small, large, small):
        assert step() is None
    assert runner.run(pixels(1))["embeddings"].shape == (1, 5)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_weight_only_int8_linears_multiply_float_activations(name: str, tmp_path: Path) -> None:
    if RUNNERS[name].available():
        pytest.skip(str(RUNNERS[name].available()))
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (256, 256)).astype(np.int8)
    scales = (0.5 + random.random(256).astype(np.float32)) / 2048
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 256] x) => (float[batch, 256] y) {
             weight = DequantizeLinear <axis: int = 1> (codes, scales)
             y = MatMul(x, weight)
           }"""
    )
    for array, called in ((codes, "codes"), (scales, "scales")):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(array, called))
    onnx.save(graph, tmp_path / "weight_only.onnx")
    x = random.normal(size=(8, 256)).astype(np.float32)
    found = open_runner(name, tmp_path / "weight_only.onnx", threads=1).run({"x": x})["y"]
    # Activations rounded to int8, the default of both engines, would be off by half a percent of the largest.
    expected = x @ (codes * scales)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_bad_inputs_name_the_input(runner: Runner) -> None:
    for call in (runner.run, runner.bind):
        with pytest.raises(UsageError, match="pixel"):
            call({"pixels": pixels(1)["pixel_values"]})
        with pytest.raises(UsageError, match="pixel_values"):
            call({})
        with pytest.raises(UsageError, match="extra"):
            call(pixels(1) | {"extra": np.zeros(1, np.float32)})


def test_read_only_and_transposed_arrays_are_fine(runner: Runner) -> None:
    inputs = pixels(2)
    expected = runner.run(inputs)["embeddings"]
    awkward = np.asfortranarray(inputs["pixel_values"])
    awkward.flags.writeable = False
    np.testing.assert_array_equal(runner.run({"pixel_values": awkward})["embeddings"], expected)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_file_that_is_no_graph_is_named(name: str, tmp_path: Path, tiny_onnx: Path) -> None:
    if RUNNERS[name].available():
        pytest.skip(str(RUNNERS[name].available()))
    (tmp_path / "text.onnx").write_bytes(b"not a graph at all")
    (tmp_path / "alone.onnx").write_bytes(tiny_onnx.read_bytes())
    graph = helper.make_graph([helper.make_node("NoSuchOp", ["x"], ["y"])], "g", [], [])
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, (1,)))
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, (1,)))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "strange.onnx"))
    for file in ("absent.onnx", "text.onnx", "alone.onnx", "strange.onnx"):
        with pytest.raises(UsageError, match=file) as caught:
            open_runner(name, tmp_path / file, threads=1)
        assert caught.value.hint
        assert "\n" not in caught.value.message


def test_wrong_shapes_and_kinds_are_refused_before_the_engine_sees_them(tiny_onnx: Path) -> None:
    pytest.importorskip("onnxruntime")
    runner = open_runner("onnxruntime", tiny_onnx, threads=1)
    with pytest.raises(UsageError, match=r"has shape 1x3x8x9, the artifact takes \?x3x8x8"):
        runner.run({"pixel_values": np.zeros((1, 3, 8, 9), np.float32)})
    with pytest.raises(UsageError, match="is int64, the artifact takes float32"):
        runner.run({"pixel_values": np.zeros((1, 3, 8, 8), np.int64)})
    half = {name: value.astype(np.float16) for name, value in pixels(1).items()}
    assert runner.run(half)["embeddings"].dtype == np.float32


def test_fitted_casts_within_a_kind_and_keeps_the_declared_order() -> None:
    declared = {"ids": Declared(np.dtype(np.int32), (None, 4)), "mask": Declared(np.dtype(bool), (None,))}
    found = fitted({"mask": np.array([1, 0]), "ids": np.zeros((2, 4), np.int64)}, declared)
    assert [(name, value.dtype.name) for name, value in found.items()] == [("ids", "int32"), ("mask", "bool")]


def test_every_row_of_the_table_can_be_read() -> None:
    for name, spec in RUNNERS.items():
        assert name == spec.name
        assert spec.devices
        assert spec.install.startswith("pip install")
        reason = spec.available()
        assert reason is None or name in reason


def test_unknown_words_get_the_closest_known_one(tiny_onnx: Path) -> None:
    with pytest.raises(UsageError, match="no runner 'onxruntime'") as caught:
        open_runner("onxruntime", tiny_onnx)
    assert "onnxruntime" in caught.value.hint
    with pytest.raises(UsageError, match="does not run on 'cuda'"):
        open_runner("openvino", tiny_onnx, device="cuda")
    with pytest.raises(UsageError, match="no precision 'int3'"):
        open_runner("torch", torch.nn.Identity(), precision="int3")
    with pytest.raises(UsageError, match="0 threads"):
        open_runner("torch", torch.nn.Identity(), threads=0)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_that_is_not_installed_is_missing_with_its_command(
    name: str, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcompress.measure.runners.find_spec", lambda module: None)
    with pytest.raises(MissingError, match=f"{name} is not installed") as caught:
        open_runner(name, tiny_onnx)
    assert "pip install 'mmcompress[" in caught.value.hint
    monkeypatch.setitem(sys.modules, name, None)  # the import itself fails, as with a broken installation
    with pytest.raises(MissingError, match=f"{name} is not installed"):
        RUNNERS[name].load(tiny_onnx, 1, "cpu", "fp32")


class TestTorch:
    def test_mappings_tuples_and_callables_are_named(self) -> None:
        inputs = {"x": np.ones((2, 3), np.float32)}
        by_name = run_torch.load(lambda x: {"twice": 2 * x, "none": None}, 1, "cpu", "fp32")
        assert {name: value.max() for name, value in by_name.run(inputs).items()} == {"twice": 2.0}
        by_place = run_torch.load(lambda x: (x, 3 * x), 1, "cpu", "fp32")
        assert by_place.run(inputs)["output_1"].max() == 3.0
        named = run_torch.TorchRunner(lambda x: (x, x), 1, output_names=["a", "b"])
        assert named.run(inputs).keys() == {"a", "b"}
        with pytest.raises(UsageError, match="2 outputs, 1 names"):
            run_torch.TorchRunner(lambda x: (x, x), 1, output_names=["a"]).run(inputs)
        with pytest.raises(UsageError, match="'past' is a list"):
            run_torch.load(lambda x: {"past": [x]}, 1, "cpu", "fp32").run(inputs)

    def test_an_exported_program_runs(self, tiny_vision: torch.nn.Module) -> None:
        program = torch.export.export(tiny_vision, (), kwargs={"pixel_values": torch.zeros(1, 3, 8, 8)})
        expected = open_runner("torch", tiny_vision, threads=1).run(pixels(1))["embeddings"]
        found = open_runner("torch", program, threads=1).run(pixels(1))
        np.testing.assert_allclose(next(iter(found.values())), expected, atol=1e-6)

    def test_bf16_is_autocast_and_comes_back_as_fp32(self, tiny_vision: torch.nn.Module) -> None:
        exact = open_runner("torch", tiny_vision, threads=1).run(pixels(2))["embeddings"]
        low = open_runner("torch", tiny_vision, threads=1, precision="bf16")
        found = low.run(pixels(2))["embeddings"]
        assert found.dtype == np.float32
        assert 1e-5 < np.abs(found - exact).max() < 0.05
        assert low.facts()["precision"] == "bf16 autocast"

    def test_threads_are_set_again_when_another_runner_changed_them(self, tiny_vision: torch.nn.Module) -> None:
        before = torch.get_num_threads()
        try:
            seen: list[int] = []
            one = run_torch.load(lambda x: (seen.append(torch.get_num_threads()), x)[1], 1, "cpu", "fp32")
            step = one.bind({"x": np.zeros(1, np.float32)})
            open_runner("torch", tiny_vision, threads=2)
            step()
            assert seen == [1]
        finally:
            torch.set_num_threads(before)

    def test_a_closed_runner_leaves_the_threads_as_they_were(self, tiny_vision: torch.nn.Module) -> None:
        before = torch.get_num_threads()
        outer = open_runner("torch", tiny_vision, threads=before + 1)
        inner = open_runner("torch", tiny_vision, threads=before + 2)
        assert torch.get_num_threads() == before + 2
        inner.close()
        outer.close()
        outer.close()
        assert torch.get_num_threads() == before

    def test_what_cannot_be_measured_is_refused(self, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="training mode"):
            open_runner("torch", torch.nn.Dropout())
        with pytest.raises(UsageError, match="takes a module or a callable"):
            open_runner("torch", str(tiny_onnx))
        with pytest.raises(UsageError, match="no fp16 on a CPU"):
            open_runner("torch", torch.nn.Identity().eval(), precision="fp16")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(MissingError, match="no CUDA device"):
            open_runner("torch", torch.nn.Identity().eval(), device="cuda")

    def test_a_closed_runner_says_so(self) -> None:
        runner = open_runner("torch", torch.nn.Identity().eval(), threads=1)
        runner.close()
        with pytest.raises(RuntimeError, match="closed"):
            runner.run({"input": np.zeros(1, np.float32)})


class TestOnnxRuntime:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("onnxruntime")

    def test_precision_comes_from_the_file(self, tiny_onnx: Path) -> None:
        with pytest.raises(UsageError, match="takes its precision from the file"):
            open_runner("onnxruntime", tiny_onnx, precision="bf16")

    def test_cuda_without_a_build_for_it_is_missing(self, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(MissingError, match="built without CUDAExecutionProvider") as caught:
            open_runner("onnxruntime", tiny_onnx, device="cuda")
        assert "mmcompress[cuda]" in caught.value.hint

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the fallback cannot be provoked where CUDA works")
    @pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
    def test_a_silent_fallback_is_an_error(self, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # A build that claims CUDA and cannot load it: the session itself comes up on the CPU without complaint.
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
        with pytest.raises(MissingError, match="CPUExecutionProvider was used instead"):
            open_runner("onnxruntime", tiny_onnx, device="cuda")

    def test_a_product_left_on_the_cpu_is_an_error_and_shape_arithmetic_is_not(
        self, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        real = onnxruntime.InferenceSession
        placed: dict[str, int] = {}

        class Claiming:
            """A real CPU session that says it got CUDA, with nodes placed as the test wants them."""

            def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
                assert providers == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
                self._session = real(path, options, providers=["CPUExecutionProvider"])

            def get_providers(self) -> list[str]:
                return ["CUDAExecutionProvider", "CPUExecutionProvider"]

            def __getattr__(self, name: str) -> Any:
                return getattr(self._session, name)

        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", Claiming)
        with pytest.raises(MissingError, match=r"fell back to the CPU: .*MatMul"):
            open_runner("onnxruntime", tiny_onnx, device="cuda")
        monkeypatch.setattr(run_onnxruntime, "_placed_on_cpu", lambda session: placed)
        placed.update({"Shape": 3, "Gather": 1})
        facts = open_runner("onnxruntime", tiny_onnx, device="cuda").facts()
        assert facts["nodes_on_cpu"] == {"Shape": 3, "Gather": 1}
