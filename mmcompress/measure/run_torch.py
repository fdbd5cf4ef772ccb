"""PyTorch as a runner: a module, an exported program or any callable that takes named tensors.

Lower precision is autocast, which leaves norms and softmax in fp32 and casts the weights on every call. On a CUDA device
torch's setting for TF32 (off unless somebody turned it on) is left alone and reported.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from mmcompress.errors import MissingError, UsageError
from mmcompress.measure.runner import Array, Arrays, Step

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRunner:
    """Runs a callable under `torch.inference_mode`; see `runner.Runner` for the contract."""

    name = "torch"

    def __init__(
        self,
        module: Callable[..., Any],
        threads: int,
        device: str = "cpu",
        precision: str = "fp32",
        output_names: Sequence[str] | None = None,
    ) -> None:
        self.device, self._threads, self._precision = device, threads, precision
        self._autocast = _DTYPES[precision]
        self._module: Callable[..., Any] | None = _on(module, device)
        self._output_names: Sequence[str] = output_names or getattr(module, "output_names", None) or ()
        # The setting is the process's: whoever trains after a timing must find what was there before.
        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "engine": "torch",
            "version": torch.__version__,
            "device": self.device,
            "threads": self._threads,
            "precision": self._precision if self._autocast is None else f"{self._precision} autocast",
        }
        if self.device == "cuda":
            facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
        return facts

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        outputs = self._named(self._call(self._placed(inputs)))
        return {name: _to_numpy(tensor) for name, tensor in outputs.items()}

    def chain(self, inputs: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        found = self._named(self._call(self._placed(inputs)))
        return {name: tensor if name in keep else _to_numpy(tensor) for name, tensor in found.items()}

    def bind(self, inputs: Mapping[str, Array]) -> Step:
        placed = self._placed(inputs)

        def step() -> None:
            self._call(placed)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return step

    def close(self) -> None:
        if self._module is not None:
            torch.set_num_threads(self._before)
        self._module = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _call(self, placed: dict[str, torch.Tensor]) -> Any:
        module = self._open()
        if torch.get_num_threads() != self._threads:  # another runner may have changed it
            torch.set_num_threads(self._threads)
        lower = nullcontext() if self._autocast is None else torch.autocast(self.device, self._autocast)
        with torch.inference_mode(), lower:
            return module(**placed)

    def _open(self) -> Callable[..., Any]:
        if self._module is None:
            raise RuntimeError("this runner was closed")
        return self._module

    def _placed(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        module = self._open()
        try:
            signature = inspect.signature(module.forward if isinstance(module, torch.nn.Module) else module)
            signature.bind(**inputs)
        except TypeError as error:
            raise UsageError(
                f"the inputs do not fit the module: {error}", hint="its inputs are " + ", ".join(signature.parameters)
            ) from error
        return {name: self._tensor(value).to(self.device) for name, value in inputs.items()}

    @staticmethod
    def _tensor(value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        # from_numpy shares memory and wants it writable: read-only arrays are copied.
        return torch.from_numpy(np.require(np.asarray(value), requirements=["C", "W"]))

    def _named(self, outputs: Any) -> dict[str, torch.Tensor]:
        if isinstance(outputs, Mapping):
            named = {str(name): value for name, value in outputs.items() if value is not None}
        else:
            values = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            names = self._output_names or (
                ["output"] if isinstance(outputs, torch.Tensor) else [f"output_{i}" for i in range(len(values))]
            )
            if len(names) != len(values):
                raise UsageError(
                    f"the module returns {len(values)} outputs, {len(names)} names were given",
                    hint="give one name per output",
                )
            named = dict(zip(names, values, strict=True))
        for name, value in named.items():
            if not isinstance(value, torch.Tensor):
                raise UsageError(
                    f"output '{name}' is a {type(value).__name__}, not a tensor",
                    hint="wrap the module so that it returns the tensors of interest",
                )
        return named


def load(artifact: Any, threads: int, device: str, precision: str) -> TorchRunner:
    """Make a runner. Raises UsageError for something that cannot be called, or a module in training mode."""
    if isinstance(artifact, torch.export.ExportedProgram):
        artifact = artifact.module()  # a graph module without a mode: it was exported in one
    elif isinstance(artifact, torch.nn.Module) and artifact.training:
        raise UsageError("the module is in training mode: dropout would be measured", hint="call .eval() on it first")
    elif not callable(artifact):
        raise UsageError(
            f"the torch runner takes a module or a callable, not '{artifact}'",
            hint="load it with mmcompress.load first",
        )
    if device == "cpu" and precision == "fp16":
        raise UsageError("the torch runner offers no fp16 on a CPU", hint="ask for bf16")
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("CUDA was asked for, and torch finds no CUDA device", hint="run 'mmc doctor'")
    return TorchRunner(artifact, threads, device, precision)


def _on(module: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The module on `device`; a copy where it has to move, so that the caller's stays where it is."""
    if not isinstance(module, torch.nn.Module):
        return module
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.device.type == device for tensor in tensors):
        return module
    return copy.deepcopy(module).to(device)


def _to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
