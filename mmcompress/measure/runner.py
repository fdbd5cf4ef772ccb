"""The contract every engine keeps: named arrays in, named arrays out, the same threads, and facts about what really ran.

Precision words mean the same for all engines. ``fp32`` runs what the artifact stores and never less: floats are computed
in fp32, int8 stays int8. ``bf16`` and ``fp16`` allow float work in that format. ONNX Runtime and TensorRT take their
precision from the file alone and refuse any other request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmcompress.errors import UsageError, closest

Array = NDArray[Any]
Arrays = dict[str, Array]
Step = Callable[[], None]

PRECISIONS = ("fp32", "bf16", "fp16")


class Runner(Protocol):
    """One artifact loaded in one engine on one device ("cpu" or "cuda")."""

    name: str
    device: str

    def facts(self) -> dict[str, Any]:
        """What runs: engine, version, device, providers, threads, precision; JSON-able."""

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        """Compute once. Raises UsageError for a missing or unknown input, or a shape or dtype that does not fit."""

    def bind(self, inputs: Mapping[str, Array]) -> Step:
        """Place `inputs` where the engine wants them; each call of the result computes once and waits until it is done.

        This is what a timing should call: copies to and from the device and conversions stay outside.
        """

    def chain(self, inputs: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        """Compute once from arrays and from what an earlier call kept; outputs named in `keep` stay as the engine holds them.

        What is kept may go into another runner of the same engine and device. It is never copied on the way where the
        engine allows that, which is what a growing cache of keys and values needs. Raises what `run` raises.
        """

    def close(self) -> None:
        """Give the engine's memory back; the runner cannot be used afterwards."""


@dataclass(frozen=True)
class Declared:
    """What an artifact says about one input: numpy dtype (None: numpy has none) and shape (None: open)."""

    dtype: np.dtype[Any] | None
    shape: tuple[int | None, ...]


def fitted(inputs: Mapping[str, Array], declared: Mapping[str, Declared]) -> Arrays:
    """Check `inputs` against what is declared and return them contiguous in the declared dtypes, in declared order.

    Floats are cast to other floats and integers to other integers; a float where ids are wanted is an error.
    Raises UsageError naming the input that is missing, unknown or does not fit.
    """
    for name in inputs:
        if name not in declared:
            raise UsageError(f"there is no input '{name}'", hint=closest(name, declared))
    placed: Arrays = {}
    for name, wanted in declared.items():
        if name not in inputs:
            raise UsageError(f"input '{name}' is missing", hint="the inputs are " + ", ".join(declared))
        given = np.asarray(inputs[name])
        fits = len(given.shape) == len(wanted.shape) and all(
            size in (None, found) for size, found in zip(wanted.shape, given.shape, strict=True)
        )
        if not fits:
            shape = "x".join("?" if size is None else str(size) for size in wanted.shape)
            raise UsageError(
                f"input '{name}' has shape {'x'.join(map(str, given.shape))}, the artifact takes {shape}",
                hint="'?' can be any size; the others are fixed by the export",
            )
        placed[name] = np.ascontiguousarray(_cast(name, given, wanted.dtype)).reshape(given.shape)
    return placed


def _cast(name: str, given: Array, wanted: np.dtype[Any] | None) -> Array:
    if wanted is None or given.dtype == wanted:
        return given
    kinds = {kind: group for group in ("f", "iub") for kind in group}
    if kinds.get(given.dtype.kind) != kinds.get(wanted.kind):
        raise UsageError(
            f"input '{name}' is {given.dtype}, the artifact takes {wanted}", hint="are two inputs mixed up?"
        )
    return given.astype(wanted)


def stored_precision_only(engine: str, precision: str) -> None:
    """Refuse a precision for an engine that takes it from the file. Raises UsageError."""
    if precision != "fp32":
        raise UsageError(
            f"{engine} takes its precision from the file; '{precision}' cannot be asked for when loading",
            hint=f"export again with 'mmc export --precision {precision}' and load that file",
        )
