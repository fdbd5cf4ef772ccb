"""What the names of schemes stand for: how weights are stored, and what becomes of the inputs they multiply.

A new scheme is an entry here, a layer in `surgery`, and its line in `quantize_make.Maker`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mmcompress.errors import UsageError
from mmcompress.ops.float4 import BLOCKS

Weights = Literal["float", "int8", "int4", "float8", "nf4", "fp4", "mxfp4", "nvfp4"]
Inputs = Literal["float", "static", "dynamic"]


@dataclass(frozen=True)
class Scheme:
    """How the layers of a tower are stored and computed."""

    weights: Weights
    inputs: Inputs = "float"
    """What layers multiply: floats, what calibration has found a grid for, or what each token's own grid makes of it."""
    otherwise: str = ""
    """The scheme of layers that cannot have this one: of a size that no group divides, never called, or without tokens."""


OFF = "W16A16"
AUTO = "AUTO"
"""Each group of layers its own; see `quantize_mixed`."""
FLOAT_CODES = ("NF4", "FP4")
"""Those whose layers are bitsandbytes': Linears alone; all else stays float, so that plain transformers loads the checkpoint."""
SCHEMES = {
    "W8A8": Scheme("int8", "static", otherwise="W8A16"),
    "W8A16": Scheme("int8"),
    "W4A16": Scheme("int4", otherwise="W8A16"),
    "W4A8": Scheme("int4", "dynamic", otherwise="W8A16"),
    "FP8": Scheme("float8", "static", otherwise="W8A16"),
    "MXFP4": Scheme("mxfp4", otherwise="W8A16"),
    "NVFP4": Scheme("nvfp4", otherwise="W8A16"),
    "NF4": Scheme("nf4"),
    "FP4": Scheme("fp4"),
    OFF: Scheme("float"),
    AUTO: Scheme("float"),
}
FOUR_BITS = {AUTO, *(name for name, scheme in SCHEMES.items() if scheme.weights == "int4")}
"""Those with which layers may have 4-bit integers."""
WEIGHTS_ALONE = {"W8A16", *FOUR_BITS}
"""Those whose weights can be scaled and fitted, as nothing rounds their inputs on a grid of calibration."""


def with_activations(name: str, activations: Literal["static", "dynamic"]) -> Scheme:
    """Return the scheme `name`, whose inputs get the kind of grid asked for where it has one for all of them."""
    scheme = SCHEMES[name]
    return replace(scheme, inputs=activations) if scheme.inputs == "static" else scheme


def refuse_target(name: str, target: str, observer: str) -> None:
    """Raise UsageError where a scheme does not go to a target, or has no ranges of the kind asked for."""
    weights = SCHEMES[name].weights
    if weights == "int4" and target == "tensorrt":
        raise UsageError(
            f"quantize.scheme {name} does not go to tensorrt, which cannot read its 4-bit layers",
            hint="use W8A8 or W8A16, or another target",
        )
    if weights in BLOCKS and target == "cpu":
        raise UsageError(
            f"quantize.scheme {name} does not go to cpu: onnxruntime has no 4-bit floats there",
            hint="use --target openvino, cuda or tensorrt, or scheme W4A16",
        )
    if weights == "mxfp4" and target == "tensorrt":
        raise UsageError("quantize.scheme MXFP4 does not go to tensorrt", hint="use NVFP4")
    if weights == "float8" and target in ("cpu", "openvino"):
        raise UsageError(
            f"quantize.scheme {name} does not go to {target}: no CPU multiplies 8-bit floats, they would be widened each time",
            hint="use W8A8, or target tensorrt or cuda",
        )
    if weights == "float8" and observer in ("mse", "entropy"):
        raise UsageError(
            f"quantize.observer {observer} weighs the steps of integers, which {name} has not",
            hint="use min-max or percentile",
        )
