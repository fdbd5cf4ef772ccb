"""How big a thing is: bytes on disk, parameters, multiply-accumulates; recounted from the thing itself.

The counting of MACs lives in `macs` (running modules) and `onnx_recount` (exported graphs); both are offered here too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmcompress.errors import UsageError
from mmcompress.measure.macs import MacCount, macs
from mmcompress.measure.onnx_graph import external_files, onnx_initializer_dtypes, onnx_op_histogram
from mmcompress.measure.onnx_recount import onnx_macs
from mmcompress.surgery.float4 import Float4Linear
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.packed import PackedLinear

__all__ = [
    "ArtifactSize",
    "MacCount",
    "ParameterCount",
    "artifact_size",
    "macs",
    "onnx_initializer_dtypes",
    "onnx_macs",
    "onnx_op_histogram",
    "parameters",
]

_KINDS = {
    ".safetensors": "weights",
    ".bin": "weights",
    ".onnx": "graph",
    ".data": "graph data",
    ".onnx_data": "graph data",
    ".xml": "graph",
    ".engine": "engine",
    ".plan": "engine",
    ".json": "config",
    ".txt": "config",
    ".yaml": "config",
    ".md": "text",
}


@dataclass(frozen=True)
class ArtifactSize:
    """Bytes on disk: in total, per kind of file (weights, graph, graph data, engine, config, text, other), and files."""

    total: int
    by_kind: dict[str, int]
    files: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def artifact_size(path: str | Path) -> ArtifactSize:
    """Bytes of a file or of everything under a folder.

    A graph alone is not an artifact: the external data of an .onnx file and the weights of an OpenVINO .xml count with
    it. A file linked twice counts once. Raises UsageError where nothing is there or an .onnx file cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.is_file())
    elif place.is_file():
        found = [place, *_companions(place)]
    else:
        raise UsageError(f"no file or folder at '{path}'", hint="check the path")
    unique = {(status.st_dev, status.st_ino): (file, status.st_size) for file in found for status in [file.stat()]}
    by_kind: Counter[str] = Counter()
    for file, size in unique.values():
        by_kind[_KINDS.get(file.suffix.lower(), "other")] += size
    return ArtifactSize(sum(by_kind.values()), dict(sorted(by_kind.items())), len(unique))


def _companions(graph: Path) -> list[Path]:
    if graph.suffix == ".onnx":
        return external_files(graph)
    weights = graph.with_suffix(".bin")
    return [weights] if graph.suffix == ".xml" and weights.is_file() else []


@dataclass(frozen=True)
class ParameterCount:
    """Numbers held by a module, tied tensors once.

    `elements` counts every parameter and every persistent buffer of at least two dimensions, because a quantized layer
    keeps its weights in buffers; of packed weights each number they hold, and neither their scales nor zero points.
    `trainable` counts only parameters that take gradients. `bytes` is what all of it, scales and small buffers included,
    takes at its present dtypes; `by_dtype` splits that.
    """

    elements: int
    trainable: int
    bytes: int
    by_dtype: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parameters(module: torch.nn.Module) -> ParameterCount:
    """Count the parameters and stored buffers of `module`; works on meta modules."""
    stored = module.state_dict(keep_vars=True)
    unique = {id(tensor): tensor for tensor in stored.values() if isinstance(tensor, torch.Tensor)}.values()
    by_dtype: Counter[str] = Counter()
    packed: list[Any] = [
        layer for layer in module.modules() if isinstance(layer, PackedLinear | Float4Linear) or is_float_coded(layer)
    ]
    held = {id(tensor) for layer in packed for tensor in layer.buffers(recurse=False)}
    held |= {id(layer.weight) for layer in packed if is_float_coded(layer)}
    elements, trainable = sum(layer.in_features * layer.out_features for layer in packed), 0
    for tensor in unique:
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
        if id(tensor) not in held and (isinstance(tensor, torch.nn.Parameter) or tensor.dim() >= 2):
            elements += tensor.numel()
        trainable += tensor.numel() if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad else 0
    return ParameterCount(elements, trainable, sum(by_dtype.values()), dict(sorted(by_dtype.items())))
