"""ONNX Runtime as a runner, on the CPU or through its CUDA provider.

A session that cannot use the provider it was asked for quietly takes the CPU. Here that is an error: the session's
providers are compared with the request, and on CUDA no matrix product may have been placed on the CPU. TF32 is off, and
so is the quantization of activations that meet weight-only int8 linears, so that a file runs as stored; a file whose packed
products ask for it gets it for all of them. Idle worker threads stop spinning after each run: in interleaved rounds they would
otherwise take cores from whoever is measured next (about 20 ms of processor time after every run, measured on two cores).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import MissingError, UsageError
from mmcompress.measure.onnx_graph import external_files, read_graph, rounded_blocks
from mmcompress.measure.onnx_rules import NO_RULE, RULES
from mmcompress.measure.runner import Array, Arrays, Declared, Step, fitted, stored_precision_only

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INSTALL = {"cpu": "pip install 'mmcompress[cpu]'", "cuda": "pip install 'mmcompress[cuda]'"}
_HEAVY = RULES.keys() | NO_RULE | {"LayerNormalization", "Softmax", "DynamicQuantizeLinear"}
"""Operators that must not land on the CPU when CUDA was asked for; shape arithmetic may."""

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeRunner:
    """Runs one session; see `runner.Runner` for the contract."""

    name = "onnxruntime"

    def __init__(self, session: Any, threads: int, device: str, on_cpu: dict[str, int]) -> None:
        self.device, self._session, self._threads, self._on_cpu = device, session, threads, on_cpu
        self._outputs = [output.name for output in session.get_outputs()]
        self._declared = {
            value.name: Declared(
                np.dtype(_NUMPY[value.type]) if value.type in _NUMPY else None,
                tuple(size if isinstance(size, int) else None for size in value.shape),
            )
            for value in session.get_inputs()
        }

    def facts(self) -> dict[str, Any]:
        import onnxruntime

        facts: dict[str, Any] = {
            "engine": "onnxruntime",
            "version": onnxruntime.__version__,
            "device": self.device,
            "providers": self._session.get_providers(),
            "threads": self._threads,
            "precision": "as stored",
        }
        if self.device != "cpu":
            facts["nodes_on_cpu"] = self._on_cpu
        return facts

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        found = self._session.run(self._outputs, fitted(inputs, self._declared))
        return dict(zip(self._outputs, found, strict=True))

    def bind(self, inputs: Mapping[str, Array]) -> Step:
        import onnxruntime

        binding = self._session.io_binding()
        for name, array in fitted(inputs, self._declared).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0))
        for name in self._outputs:
            binding.bind_output(name, self.device)
        session = self._session

        def step() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return step

    def chain(self, inputs: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        import onnxruntime

        binding = self._session.io_binding()
        arrays = {name: value for name, value in inputs.items() if not isinstance(value, onnxruntime.OrtValue)}
        wanted = {name: declared for name, declared in self._declared.items() if name not in inputs or name in arrays}
        for name, array in fitted(arrays, wanted).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0))
        for name, value in inputs.items():
            if name not in arrays:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self.device if name in keep else "cpu")
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        found = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: value if name in keep else value.numpy() for name, value in found}

    def close(self) -> None:
        self._session = None


def load(artifact: Any, threads: int, device: str, precision: str) -> OnnxRuntimeRunner:
    """Open a session on the .onnx file `artifact`.

    Raises UsageError for a file that is missing, not ONNX or not understood; MissingError without onnxruntime, without
    the provider for `device`, or when the session or a product in it fell back to the CPU.
    """
    stored_precision_only("onnxruntime", precision)
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as states
    except ImportError as error:
        raise MissingError("onnxruntime is not installed", hint=_INSTALL[device]) from error
    path, provider = Path(artifact), _PROVIDERS[device]
    rounds = rounded_blocks(read_graph(path)) > 0
    external_files(path)
    if provider not in onnxruntime.get_available_providers():
        raise MissingError(f"this onnxruntime was built without {provider}", hint=_INSTALL[device])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # By default (1.32) a linear with int8 weights and float inputs rounds its inputs to int8 at run time (4); 1 is float32, which
    # has no fast kernel: SmolLM2's tied output layer alone made a token in 4 bits take four times as long as all of it in float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4" if rounds else "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    requested: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        requested.insert(0, (provider, {"use_tf32": "0"}))
    understood = (
        states.Fail,
        states.InvalidArgument,
        states.InvalidGraph,
        states.InvalidProtobuf,
        states.NotImplemented,
        states.RuntimeException,
    )
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=requested)
    except understood as error:
        unknown = isinstance(error, states.NotImplemented)
        raise UsageError(
            f"onnxruntime cannot load '{path}': {_last_line(error)}",
            hint="it has no kernel for that here: try --runner openvino" if unknown else "export it again",
        ) from error
    if session.get_providers()[0] != provider:
        raise MissingError(
            f"{provider} was asked for and {session.get_providers()[0]} was used instead",
            hint="its libraries do not load here; 'mmc doctor' says which are missing",
        )
    on_cpu = _placed_on_cpu(session) if device != "cpu" else {}
    heavy = {name: count for name, count in on_cpu.items() if name in _HEAVY}
    if heavy:
        listed = ", ".join(f"{count} {name}" for name, count in heavy.items())
        raise MissingError(
            f"{provider} cannot run parts of '{path}', they fell back to the CPU: {listed}",
            hint="quantize with --target cuda and export that, or run it on the CPU",
        )
    return OnnxRuntimeRunner(session, threads, device, on_cpu)


def _placed_on_cpu(session: Any) -> dict[str, int]:
    """Operators the session placed on the CPU, with their number."""
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == "CPUExecutionProvider":
            for node in part.get_nodes():
                found[node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"] += 1
    return dict(found)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
