"""What this machine can run: every runtime and optional package, whether it works, and the command that gets it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runners import RUNNERS

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Part:
    """One thing that may be there."""

    part: str
    state: State
    version: str
    used_for: str
    get: str
    reason: str = ""


# package -> (used for, how to get it); runners are listed by themselves
OPTIONAL: dict[str, tuple[str, str]] = {
    "accelerate": ("mmc distill on several processes", "pip install 'mmcompress[train]'"),
    "torch-pruning": ("cross-checking the groups of mmc prune", "pip install 'mmcompress[prune]'"),
    "highspy": ("mmc quantize --scheme auto", "pip install 'mmcompress[mixed]'"),
    "bitsandbytes": ("mmc quantize --scheme NF4 and FP4", "pip install 'mmcompress[bnb]'"),
    "soundfile": ("reading recordings", "pip install 'mmcompress[audio]'"),
    "soxr": ("resampling recordings", "pip install 'mmcompress[audio]'"),
    "compressed-tensors": (
        "transformers loading what mmc export --to compressed-tensors wrote",
        "pip install 'mmcompress[peers]'",
    ),
    "nncf": ("the peer bench/compare_nncf.py measures against", "pip install 'mmcompress[peers]'"),
}
RUNTIME_PACKAGES = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"),
}


def examine() -> dict[str, Any]:
    """Return {"machine": facts, "parts": [...]}; a part with state "problem" makes something fail or lie."""
    parts = [_runner(name) for name in RUNNERS]
    parts += [_package(name, *facts) for name, facts in OPTIONAL.items()]
    conflict = _conflict()
    return {"machine": machine_facts(), "parts": [asdict(part) for part in ([conflict] if conflict else []) + parts]}


def _runner(name: str) -> Part:
    spec = RUNNERS[name]
    reason = spec.available()
    version = next((found for package in RUNTIME_PACKAGES[name] if (found := _version(package))), "")
    return Part(
        name, "ok" if reason is None else "missing", version, f"running {spec.takes}", spec.install, reason or ""
    )


def _package(name: str, used_for: str, get: str) -> Part:
    version = _version(name)
    return Part(name, "ok" if version else "missing", version, used_for, get)


def _conflict() -> Part | None:
    """onnxruntime and onnxruntime-gpu install into the same folder; with both, which one runs is chance."""
    both = [_version("onnxruntime"), _version("onnxruntime-gpu")]
    if not all(both):
        return None
    return Part(
        "onnxruntime",
        "problem",
        " and ".join(both),
        "running an .onnx file",
        "pip uninstall onnxruntime onnxruntime-gpu, then install one of mmcompress[cpu] and mmcompress[cuda]",
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
