"""The two libraries that build engines, `tensorrt` and TensorRT-RTX, behind the API they share."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal

from mmcompress.errors import MissingError

ApiName = Literal["auto", "tensorrt", "tensorrt_rtx"]
MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}
INSTALL = "pip install 'mmcompress[tensorrt]' (with a GPU) or 'mmcompress[rtx]' (builds without one)"


@dataclass(frozen=True)
class Api:
    """The one of the two libraries that is used."""

    name: str
    trt: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)


def load_api(name: ApiName = "auto") -> Api:
    """Import TensorRT or TensorRT-RTX. "auto" prefers TensorRT where it has a GPU. Raises MissingError."""
    problems = []
    for candidate in MODULES if name == "auto" else (name,):
        try:
            api = Api(candidate, importlib.import_module(MODULES[candidate]))
        except ImportError as error:
            problems.append(f"{candidate}: {error}")
            continue
        try:
            api.trt.Builder(logger_of(api.trt))
        except (TypeError, RuntimeError):
            # TensorRT's builder asks the driver for a device; the binding then has nothing to return.
            problems.append(f"{candidate}: it needs a GPU and its driver")
            continue
        return api
    raise MissingError("no usable TensorRT: " + "; ".join(problems), hint=INSTALL)


@functools.cache
def logger_of(trt: Any) -> Any:
    """The one logger of this process: the library keeps the first it is given, whatever comes later."""

    class Collected(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return Collected()
