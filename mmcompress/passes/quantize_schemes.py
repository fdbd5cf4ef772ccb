"""What the names of schemes stand for: how weights are stored, and what becomes of the inputs they multiply.

A new scheme is an entry here, a layer in `surgery`, and its line in `quantize_make.Maker`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["float", "int8", "int4"]
Inputs = Literal["float", "static"]


@dataclass(frozen=True)
class Scheme:
    """How the layers of a tower are stored and computed."""

    weights: Weights
    inputs: Inputs = "float"
    """What layers multiply: floats, or what calibration has found a grid for."""
    otherwise: str = ""
    """The scheme of layers that cannot have this one: of a size that no group divides, or never called."""


OFF = "W16A16"
SCHEMES = {
    "W8A8": Scheme("int8", "static", otherwise="W8A16"),
    "W8A16": Scheme("int8"),
    "W4A16": Scheme("int4", otherwise="W8A16"),
    OFF: Scheme("float"),
}
