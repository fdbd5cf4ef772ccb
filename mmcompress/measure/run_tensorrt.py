"""TensorRT and TensorRT-RTX as runners: one file over two modules that share the interface used here.

An engine is bound to the version that built it, and to a kind of device. Tensors live on the device and are torch's, so
that nothing but torch and the engine's own module is needed. The precision is the one the engine was built with (both
know strongly typed networks only). TensorRT-RTX compiles its kernels at the first run: warm up before timing.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcompress.errors import MissingError, MmcError, UsageError
from mmcompress.measure.runner import Array, Arrays, Declared, Step, fitted, stored_precision_only

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_EXTRAS = {"tensorrt": "pip install 'mmcompress[tensorrt]'", "tensorrt_rtx": "pip install 'mmcompress[rtx]'"}
_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""Engine dtypes by name; others (FP8, FP4) occur inside engines, not at their inputs and outputs."""

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Smallest, best and largest shape of every input."""


class TensorRtRunner:
    """Runs one engine; see `runner.Runner` for the contract.

    `trt` is the module, `stream` a torch CUDA stream; `device` is what torch calls the place of the tensors.
    """

    def __init__(self, name: str, trt: Any, engine: Any, stream: Any, device: str, threads: int) -> None:
        self.name, self.device = name, device
        self._trt, self._engine, self._stream, self._threads = trt, engine, stream, threads
        self._current: dict[str, torch.Tensor] | None = None
        self._context = engine.create_execution_context()
        if self._context is None:
            raise MmcError(f"{name} could not set up the engine", hint="is there enough memory left on the device?")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {tensor: engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT for tensor in names}
        self._inputs = [tensor for tensor in names if is_input[tensor]]
        self._outputs = [tensor for tensor in names if not is_input[tensor]]
        self._profiles: list[Profile] = [
            {tensor: _profile_shapes(engine, tensor, i) for tensor in self._inputs}
            for i in range(engine.num_optimization_profiles)
        ]
        self._declared = {
            tensor: Declared(
                _numpy_dtype(self._dtype(tensor)),
                tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(tensor)),
            )
            for tensor in self._inputs
        }

    def facts(self) -> dict[str, Any]:
        cuda = self.device == "cuda"
        return {
            "engine": self.name,
            "version": str(self._trt.__version__),
            "device": self.device,
            "device_name": torch.cuda.get_device_name() if cuda else self.device,
            "threads": self._threads,
            "precision": "as built",
            "profiles": [
                {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
                for profile in self._profiles
            ],
        }

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        outputs, step = self._prepare(inputs)
        step()
        return {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
            for name, tensor in outputs.items()
        }

    def chain(self, inputs: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        """See `runner.Runner`; everything passes through arrays: no engine is built of a part with a growing cache."""
        return dict(self.run(inputs))

    def bind(self, inputs: Mapping[str, Array]) -> Step:
        return self._prepare(inputs)[1]

    def close(self) -> None:
        self._context = self._engine = None

    def _dtype(self, tensor: str) -> torch.dtype:
        name = self._engine.get_tensor_dtype(tensor).name
        if name not in _TORCH:
            raise UsageError(
                f"'{tensor}' is {name}, which cannot be an engine's input or output here",
                hint="cast it to a float inside the exported graph",
            )
        return _TORCH[name]

    def _prepare(self, inputs: Mapping[str, Array]) -> tuple[dict[str, torch.Tensor], Step]:
        """Outputs on the device, and a step that fills them from `inputs`."""
        arrays = fitted(inputs, self._declared)
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        number = fitting_profile(self._profiles, shapes)
        held = {
            name: torch.from_numpy(np.require(array, requirements=["W"])).to(self._place(name), self._dtype(name))
            for name, array in arrays.items()
        }
        outputs: dict[str, torch.Tensor] = {}
        self._enter(number, held)
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise UsageError(
                    f"the shape of output '{name}' depends on the data", hint="export an output of a known shape"
                )
            outputs[name] = torch.empty(shape, dtype=self._dtype(name), device=self.device)
        if self.device == "cuda":
            torch.cuda.synchronize()  # the copies above ran on torch's stream, the engine has its own

        def step() -> None:
            if self._current is not outputs:  # another binding used the context, or this is the first call
                self._enter(number, held)
                for name, tensor in outputs.items():
                    self._context.set_tensor_address(name, tensor.data_ptr())
                self._current = outputs
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise MmcError(f"{self.name} failed to run the engine", hint="build it again on this device")
            self._stream.synchronize()

        return outputs, step

    def _enter(self, number: int, held: Mapping[str, torch.Tensor]) -> None:
        """Point the context at a profile and at the inputs; their shapes then decide those of the outputs."""
        context, self._current = self._context, None
        if not context.set_optimization_profile_async(number, self._stream.cuda_stream):
            raise MmcError(f"{self.name} refused optimisation profile {number}", hint="build the engine again")
        for name, tensor in held.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise UsageError(f"{self.name} refused the shape of '{name}'", hint="see the engine's profiles")
            context.set_tensor_address(name, tensor.data_ptr())
        missing = context.infer_shapes()
        if missing:
            raise UsageError(f"the engine's output shapes need '{missing[0]}'", hint="give every input")

    def _place(self, tensor: str) -> str:
        """Shape tensors are read on the host, all others on the device."""
        on_host = self._engine.get_tensor_location(tensor) == self._trt.TensorLocation.HOST
        return "cpu" if on_host else self.device


def load(name: str, artifact: Any, threads: int, device: str, precision: str) -> TensorRtRunner:
    """Deserialize the engine file `artifact` with `name` ("tensorrt" or "tensorrt_rtx").

    Raises MissingError without the module or a CUDA device; UsageError for a file that is missing or that this version
    and device cannot use.
    """
    stored_precision_only(name, precision)
    path = Path(artifact)
    if not path.is_file():
        raise UsageError(f"no engine at '{path}'", hint="build one with 'mmc export --to tensorrt'")
    module = next((module for module in _MODULES[name] if find_spec(module)), None)
    if module is None:
        raise MissingError(f"{name} is not installed", hint=_EXTRAS[name])
    if not torch.cuda.is_available():
        raise MissingError(
            f"{name} needs a CUDA device to run '{path.name}', and torch finds none",
            hint="building engines works without one; run them on a machine with an NVIDIA GPU",
        )
    trt = importlib.import_module(module)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise UsageError(
            f"'{path}' is not an engine that {name} {trt.__version__} can use on {torch.cuda.get_device_name()}",
            hint="engines belong to the version and the kind of device they were built for: build it again",
        )
    return TensorRtRunner(name, trt, engine, torch.cuda.Stream(), device, threads)


def fitting_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """Number of the first profile whose ranges hold `shapes`, preferring one built for exactly them.

    Raises UsageError naming the ranges when none does.
    """

    def inside(profile: Profile) -> bool:
        return all(
            len(shape) == len(profile[name][0])
            and all(
                low <= size <= high for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )

    fitting = [i for i, profile in enumerate(profiles) if inside(profile)]
    if not fitting:
        ranges = "; ".join(
            f"profile {i}: " + ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in profile.items())
            for i, profile in enumerate(profiles)
        )
        raise UsageError(f"no optimisation profile takes {dict(shapes)}", hint=ranges)
    best = [i for i in fitting if all(tuple(profiles[i][name][1]) == shape for name, shape in shapes.items())]
    return (best or fitting)[0]


def _profile_shapes(engine: Any, tensor: str, number: int) -> tuple[Shape, Shape, Shape]:
    low, best, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(tensor, number))
    return low, best, high


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """bf16 has no numpy dtype: such an input may come as any float and is cast on the way to the device."""
    return None if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
