"""OpenVINO as a runner on the CPU; it reads ONNX directly.

Its defaults are chosen for speed: float work goes to bf16 where the processor has it, and int8 weights multiply
activations that are quantized on the fly. Both are pinned, so that a precision is the one asked for and a weight-only
model is measured as one; a file whose packed products ask for rounded inputs gets them, in blocks of the size they name.
Pinning threads to cores is off, because the engines it is compared with do not pin either. Only the core library is used: it
sends no telemetry (the converter, which may, is never called).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import MissingError, UsageError
from mmcompress.measure.onnx_graph import external_files, read_graph, rounded_blocks
from mmcompress.measure.runner import Array, Arrays, Declared, Step, fitted

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_INSTALL = "pip install 'mmcompress[openvino]'"


class OpenVinoRunner:
    """Runs one compiled model; see `runner.Runner` for the contract."""

    name = "openvino"
    device = "cpu"

    def __init__(self, compiled: Any, threads: int, precision: str, output_names: list[str]) -> None:
        self._compiled, self._threads, self._precision, self._outputs = compiled, threads, precision, output_names
        self._request = compiled.create_infer_request()
        # By its node: a cast that compiling removed leaves its name behind as one more name of the port.
        self._declared = {
            port.get_node().get_friendly_name(): Declared(
                _numpy_dtype(port),
                tuple(dim.get_length() if dim.is_static else None for dim in port.partial_shape),
            )
            for port in compiled.inputs
        }

    def facts(self) -> dict[str, Any]:
        import openvino

        return {
            "engine": "openvino",
            "version": openvino.__version__.split("-")[0],
            "device": self.device,
            "providers": [str(name) for name in self._compiled.get_property("EXECUTION_DEVICES")],
            "threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "streams": int(self._compiled.get_property("NUM_STREAMS")),
            "precision": self._precision,
        }

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        found = self._request.infer(list(fitted(inputs, self._declared).values()), share_outputs=False)
        return {name: np.array(found[port]) for name, port in zip(self._outputs, self._compiled.outputs, strict=True)}

    def chain(self, inputs: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        # Inputs are read where they lie. Outputs are copied: the request writes its next ones into the same memory.
        placed = list(fitted(inputs, self._declared).values())
        found = self._request.infer(placed, share_inputs=True, share_outputs=True)
        return {name: np.array(found[port]) for name, port in zip(self._outputs, self._compiled.outputs, strict=True)}

    def bind(self, inputs: Mapping[str, Array]) -> Step:
        request = self._compiled.create_infer_request()
        for index, array in enumerate(fitted(inputs, self._declared).values()):
            # Into the request's own tensor: one of ours, set with set_tensor, becomes the place where every request of this
            # model puts its inputs, even after it was freed (2026.4).
            own = request.get_input_tensor(index)
            own.shape = array.shape
            own.data[...] = array

        def step() -> None:
            request.infer()

        return step

    def close(self) -> None:
        self._request = self._compiled = None


def load(artifact: Any, threads: int, device: str, precision: str) -> OpenVinoRunner:
    """Compile the .onnx or .xml file `artifact` for the CPU.

    Raises UsageError for a file that is missing or not understood; MissingError without openvino, or where the
    processor or the engine does not do `precision`.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingError("openvino is not installed", hint=_INSTALL) from error
    path = Path(artifact)
    if path.suffix == ".xml":
        if not path.is_file():
            raise UsageError(f"no OpenVINO file at '{path}'", hint="check the path")
        names: list[str] = []
        blocks = 0
    else:
        graph = read_graph(path)
        names, blocks = [output.name for output in graph.graph.output], rounded_blocks(graph)
        external_files(path)
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision.upper() not in capabilities:
        raise MissingError(
            f"this processor does not compute in {precision} (it does {', '.join(capabilities)})", hint="ask for fp32"
        )
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": blocks,
    }
    try:
        model = core.read_model(str(path))
        # Before compiling, which adds names of nodes that it removed.
        names = names or [port.any_name if port.names else f"output_{i}" for i, port in enumerate(model.outputs)]
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        hint = "export it with --experts every" if "MoE" in reason else "export it again"
        raise UsageError(f"openvino cannot load '{path}': {reason}", hint=hint) from error
    used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != _HINTS[precision]:
        raise MissingError(f"{precision} was asked for and openvino uses {used}", hint="ask for fp32")
    return OpenVinoRunner(compiled, threads, precision, names)


def _numpy_dtype(port: Any) -> np.dtype[Any] | None:
    """bf16 has no numpy dtype of its own: such an input is passed on as it comes."""
    name = port.element_type.get_type_name()
    return None if name == "bf16" else np.dtype(port.element_type.to_dtype())
