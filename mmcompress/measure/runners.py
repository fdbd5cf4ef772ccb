"""The engines an artifact can be run with, as a table one can read.

ONNX Runtime's own TensorRT-RTX provider (NvTensorRtRtx) is one more way to run an .onnx file on an NVIDIA device; the
engines built by `mmc export --to tensorrt` run through `tensorrt` and `tensorrt_rtx` here without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mmcompress.errors import MissingError, UsageError, closest
from mmcompress.measure.machine import default_threads
from mmcompress.measure.runner import PRECISIONS, Runner

__all__ = ["RUNNERS", "Runner", "RunnerSpec", "open_runner"]

Loader = Callable[[Any, int, str, str], Runner]


@dataclass(frozen=True)
class RunnerSpec:
    """One engine: what it takes, where it runs, how to load it and how to get it."""

    name: str
    takes: str
    """The artifact, in words."""
    suffixes: tuple[str, ...]
    """File names it loads; empty where it takes objects."""
    devices: tuple[str, ...]
    """Devices it runs on, the default first."""
    load: Loader
    """Called as load(artifact, threads, device, precision)."""
    available: Callable[[], str | None]
    """Why the engine cannot be used here, or None when it can; imports nothing heavy but torch for a CUDA device."""
    install: str
    """The command that gets it."""
    lowers: bool = False
    """Whether it computes in less precision than a file was stored in, where that is asked for."""


def _load_torch(artifact: Any, threads: int, device: str, precision: str) -> Runner:
    from mmcompress.measure import run_torch

    return run_torch.load(artifact, threads, device, precision)


def _load_onnxruntime(artifact: Any, threads: int, device: str, precision: str) -> Runner:
    from mmcompress.measure import run_onnxruntime

    return run_onnxruntime.load(artifact, threads, device, precision)


def _load_openvino(artifact: Any, threads: int, device: str, precision: str) -> Runner:
    from mmcompress.measure import run_openvino

    return run_openvino.load(artifact, threads, device, precision)


def _load_tensorrt(artifact: Any, threads: int, device: str, precision: str) -> Runner:
    from mmcompress.measure import run_tensorrt

    return run_tensorrt.load("tensorrt", artifact, threads, device, precision)


def _load_tensorrt_rtx(artifact: Any, threads: int, device: str, precision: str) -> Runner:
    from mmcompress.measure import run_tensorrt

    return run_tensorrt.load("tensorrt_rtx", artifact, threads, device, precision)


def _installed(*modules: str) -> str | None:
    """None where one of `modules` can be imported, else the reason."""
    return None if any(find_spec(module) for module in modules) else f"{modules[0]} is not installed"


def _installed_with_cuda(*modules: str) -> str | None:
    absent = _installed(*modules)
    if absent:
        return absent
    import torch

    return None if torch.cuda.is_available() else f"{modules[0]} needs a CUDA device, and torch finds none"


RUNNERS: dict[str, RunnerSpec] = {
    spec.name: spec
    for spec in (
        RunnerSpec(
            "torch",
            "a module, an exported program or a callable",
            (),
            ("cpu", "cuda"),
            _load_torch,
            lambda: _installed("torch"),
            "pip install mmcompress",
            lowers=True,
        ),
        RunnerSpec(
            "onnxruntime",
            "an .onnx file",
            (".onnx",),
            ("cpu", "cuda"),
            _load_onnxruntime,
            lambda: _installed("onnxruntime"),
            "pip install 'mmcompress[cpu]' (with a GPU: 'mmcompress[cuda]')",
        ),
        RunnerSpec(
            "openvino",
            "an .onnx or OpenVINO .xml file",
            (".onnx", ".xml"),
            ("cpu",),
            _load_openvino,
            lambda: _installed("openvino"),
            "pip install 'mmcompress[openvino]'",
            lowers=True,
        ),
        RunnerSpec(
            "tensorrt",
            "an engine built by TensorRT",
            (".engine", ".plan"),
            ("cuda",),
            _load_tensorrt,
            lambda: _installed_with_cuda("tensorrt"),
            "pip install 'mmcompress[tensorrt]'",
        ),
        RunnerSpec(
            "tensorrt_rtx",
            "an engine built by TensorRT-RTX",
            (".engine", ".plan"),
            ("cuda",),
            _load_tensorrt_rtx,
            lambda: _installed_with_cuda("tensorrt_rtx", "tensorrt_rtx_bindings"),
            "pip install 'mmcompress[rtx]'",
        ),
    )
}


def open_runner(
    name: str, artifact: Any, threads: int | None = None, device: str | None = None, precision: str = "fp32"
) -> Runner:
    """Load `artifact` in the engine `name`, with `threads` threads (default: see `default_threads`).

    `device` is "cpu" or "cuda" (default: the engine's first). Raises UsageError for an unknown engine, device or
    precision or an artifact it cannot load, MissingError with the command that helps where engine or device is absent.
    """
    spec = RUNNERS.get(name)
    if spec is None:
        raise UsageError(f"there is no runner '{name}'", hint=closest(name, RUNNERS))
    device = spec.devices[0] if device is None else device
    if device not in spec.devices:
        raise UsageError(f"{name} does not run on '{device}'", hint="it runs on " + ", ".join(spec.devices))
    if precision not in PRECISIONS:
        raise UsageError(f"there is no precision '{precision}'", hint=closest(precision, PRECISIONS))
    threads = default_threads() if threads is None else threads
    if threads < 1:
        raise UsageError(f"{threads} threads were asked for, the least is 1", hint="leave it out to use every core")
    reason = spec.available()
    if reason:
        raise MissingError(f"the runner '{name}' cannot be used: {reason}", hint=spec.install)
    return spec.load(artifact, threads, device, precision)
