"""TensorRT without a device: what is refused and why, and our side of the binding against an engine that computes here.

The stand-in engine keeps to the interface as documented and reads the addresses it is given; the tests marked gpu use a
real one.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmcompress.errors import MissingError, UsageError
from mmcompress.measure.run_tensorrt import TensorRtRunner, fitting_profile, load
from mmcompress.measure.runners import RUNNERS, open_runner

SMALL = {"x": ((1, 4), (1, 4), (2, 4))}
LARGE = {"x": ((1, 4), (8, 4), (16, 4))}


def test_the_profile_built_for_a_shape_is_preferred() -> None:
    assert fitting_profile([SMALL, LARGE], {"x": (2, 4)}) == 0
    assert fitting_profile([SMALL, LARGE], {"x": (16, 4)}) == 1
    assert fitting_profile([LARGE, SMALL], {"x": (1, 4)}) == 1
    with pytest.raises(UsageError, match="no optimisation profile takes") as caught:
        fitting_profile([SMALL, LARGE], {"x": (17, 4)})
    assert caught.value.hint == "profile 0: x (1, 4) to (2, 4); profile 1: x (1, 4) to (16, 4)"


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Location(Enum):
    DEVICE = 0
    HOST = 1


TRT = SimpleNamespace(TensorIOMode=Mode, TensorLocation=Location, __version__="stand-in")


class Context:
    """Computes y = 2 x at the addresses it was given."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.profiles: list[int] = []

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.profiles.append(number)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self.shape))
        source = (ctypes.c_float * count).from_address(self.addresses["x"])
        target = (ctypes.c_float * count).from_address(self.addresses["y"])
        for i in range(count):
            target[i] = 2 * source[i]
        return True


class Engine:
    num_io_tensors, num_optimization_profiles = 2, 2

    def __init__(self) -> None:
        self.context = Context()

    def create_execution_context(self) -> Context:
        return self.context

    def get_tensor_name(self, i: int) -> str:
        return ("x", "y")[i]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 4)

    def get_tensor_profile_shape(self, name: str, number: int) -> Any:
        return (SMALL, LARGE)[number][name]

    def get_tensor_location(self, name: str) -> Location:
        return Location.DEVICE


@pytest.fixture
def runner() -> TensorRtRunner:
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    return TensorRtRunner("tensorrt", TRT, Engine(), stream, "cpu", threads=1)


def test_inputs_reach_the_engine_and_outputs_come_back(runner: TensorRtRunner) -> None:
    for batch in (1, 2, 16):
        x = np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)
        np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)


def test_two_bindings_keep_their_shapes_and_profiles(runner: TensorRtRunner) -> None:
    context = runner._engine.context
    small, large = runner.bind({"x": np.ones((1, 4), np.float32)}), runner.bind({"x": np.ones((16, 4), np.float32)})
    for step, shape, profile in ((small, (1, 4), 0), (large, (16, 4), 1), (small, (1, 4), 0)):
        step()
        assert (context.shape, context.profiles[-1]) == (shape, profile)
    entered = len(context.profiles)
    small()
    assert len(context.profiles) == entered  # nothing is set again while nobody else uses the context


def test_facts_and_refusals(runner: TensorRtRunner) -> None:
    facts = runner.facts()
    assert (facts["engine"], facts["version"], facts["precision"]) == ("tensorrt", "stand-in", "as built")
    assert facts["profiles"][1] == {"x": [[1, 4], [8, 4], [16, 4]]}
    with pytest.raises(UsageError, match="no optimisation profile"):
        runner.run({"x": np.ones((17, 4), np.float32)})
    with pytest.raises(UsageError, match=r"takes \?x4"):
        runner.run({"x": np.ones((1, 5), np.float32)})


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_without_module_or_device_the_reason_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "tiny.engine"
    engine.write_bytes(b"anything")
    with pytest.raises(UsageError, match=r"no engine at .*absent\.engine"):
        load(name, tmp_path / "absent.engine", 1, "cuda", "fp32")
    with pytest.raises(UsageError, match="takes its precision from the file"):
        load(name, engine, 1, "cuda", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mmcompress.measure.runners.find_spec", lambda module: True)
    with pytest.raises(MissingError, match=f"{name} needs a CUDA device, and torch finds none"):
        open_runner(name, engine)
    monkeypatch.setattr("mmcompress.measure.run_tensorrt.find_spec", lambda module: True)
    with pytest.raises(MissingError, match=r"needs a CUDA device to run 'tiny\.engine'"):
        load(name, engine, 1, "cuda", "fp32")
    monkeypatch.setattr("mmcompress.measure.run_tensorrt.find_spec", lambda module: None)
    with pytest.raises(MissingError, match=f"{name} is not installed"):
        load(name, engine, 1, "cuda", "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_real_engine_gives_the_module_s_numbers(
    name: str, tiny_onnx: Path, tiny_vision: torch.nn.Module, tmp_path: Path
) -> None:
    if RUNNERS[name].available():
        pytest.skip(str(RUNNERS[name].available()))
    import importlib

    trt = importlib.import_module("tensorrt" if name == "tensorrt" else "tensorrt_rtx_bindings")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tiny_onnx))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("pixel_values", (1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))
    config.add_optimization_profile(profile)
    path = tmp_path / "tiny.engine"
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    runner = open_runner(name, path)
    for batch in (1, 8):
        pixels = np.random.default_rng(0).normal(size=(batch, 3, 8, 8)).astype(np.float32)
        with torch.no_grad():
            expected = tiny_vision(torch.from_numpy(pixels)).numpy()
        np.testing.assert_allclose(runner.run({"pixel_values": pixels})["embeddings"], expected, atol=1e-2)
    with pytest.raises(UsageError, match="no optimisation profile"):
        runner.run({"pixel_values": np.zeros((9, 3, 8, 8), np.float32)})
