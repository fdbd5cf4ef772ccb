"""Whether a model fits into memory, asked before it is loaded: a process the kernel kills says nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from mmcompress.errors import OutOfMemory

FLOATS = {"F64", "F32", "F16", "BF16"}
BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
"""Of integers with more than one byte; all others have one."""
HELD = 1.5
"""Times a model's size in memory, with room to work."""
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def require_room(files: Sequence[Path], itemsize: int) -> None:
    """Raise OutOfMemory when the tensors in safetensors `files`, floats of `itemsize` bytes, are more than there is room for.

    Says nothing of pickled weights, nor where the system does not tell what is available.
    """
    free = available()
    if free is None or any(file.suffix != ".safetensors" for file in files):
        return
    needed = bytes_as(files, itemsize)
    if needed > free:
        raise OutOfMemory(
            f"the weights take {needed / 2**30:.1f} GiB of memory at {8 * itemsize} bits; {free / 2**30:.1f} GiB are available",
            hint="what never holds the whole model: mmc inspect, mmc quantize without --eval-data, and without data mmc merge and "
            "mmc prune --score magnitude --compensate none",
        )


def fits(files: Sequence[Path], itemsize: int) -> bool:
    """Whether a model of the tensors in safetensors `files` can be worked with in memory; also where nobody can tell."""
    free = available()
    if free is None or any(file.suffix != ".safetensors" for file in files):
        return True
    return HELD * bytes_as(files, itemsize) <= free


def bytes_as(files: Sequence[Path], itemsize: int) -> int:
    """Return what the tensors in safetensors `files` take with floats of `itemsize` bytes."""
    total = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                view = opened.get_slice(key)
                kind = view.get_dtype()
                total += math.prod(view.get_shape()) * (itemsize if kind in FLOATS else BYTES.get(kind, 1))
    return total


def available(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Return the bytes a process may still take, of the system or of its control group (v2); None where nobody tells."""
    found = []
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
