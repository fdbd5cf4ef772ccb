"""The machine a number was measured on: what it is, which versions ran, and whether it was busy.

Nothing here identifies a person or a host: no host name, no user, no path, no serial number. Versions are read from the
installed metadata, so that recording them imports no runtime.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

BUSY_SHARE = 0.5
"""Above this load per usable core another program is likely to disturb a timing."""

_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
_ARM_FLAGS = ("asimddp", "i8mm", "bf16", "sve")
_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-libs",
)
_NVIDIA_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit")


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by a control group's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, min(cores, int(quota) if quota else cores))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs granted by the control group (version 2, else version 1); None when unlimited or not on Linux."""
    limit = _read(root / "cpu.max").split()
    if not limit:
        limit = [_read(root / "cpu/cpu.cfs_quota_us").strip(), _read(root / "cpu/cpu.cfs_period_us").strip()]
    try:
        quota, period = (float(part) for part in limit)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def load_average() -> float | None:
    """Programs running or waiting, averaged over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy_warning(load: float | None, cores: int) -> str | None:
    """One line when the machine was too busy for a timing to be trusted, else None."""
    if load is None or load <= BUSY_SHARE * cores:
        return None
    return (
        f"the machine was busy: load {load:.2f} on {cores} cores, limit {BUSY_SHARE * cores:.2f}; "
        "ratios from interleaved rounds may hold, absolute times may not"
    )


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """Facts to store beside every measurement; JSON-able. Call it before measuring: the load is the one at the start.

    `threads` is what the measurement was told to use. Keys: cpu, cores, threads, flags, memory_mib, os, python,
    versions, cuda (None without a device), load_average, busy (None or a warning).
    """
    cores, load = usable_cores(), load_average()
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "threads": cores if threads is None else threads,
        "flags": cpu_flags(),
        "memory_mib": memory_mib(),
        "os": " ".join([platform.system(), ".".join(platform.release().split(".")[:2]), platform.machine()]),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "cuda": cuda_facts(),
        "load_average": load,
        "busy": busy_warning(load, cores),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's marketing name, else the architecture."""
    for line in _read(cpuinfo).splitlines():
        if line.lower().startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those instruction sets of this processor that decide which low-precision kernels are fast."""
    for line in _read(cpuinfo).splitlines():
        name, _, found = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            present = set(found.split())
            wanted = _FLAGS if name.strip().lower() == "flags" else _ARM_FLAGS
            return [flag for flag in wanted if flag in present]
    return []


def memory_mib() -> int | None:
    """Physical memory in MiB; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, OSError, ValueError):
        return None


def installed_versions() -> dict[str, str]:
    """Versions of the runtimes that are installed, by distribution name."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cuda_facts() -> dict[str, Any] | None:
    """Name, memory, compute capability, driver and clocks of the current CUDA device; None without one."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, Any] = {
        "name": device.name,
        "memory_mib": device.total_memory // 2**20,
        "capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
    }
    return facts | _nvidia_facts(torch.cuda.current_device())


def _nvidia_facts(device: int) -> dict[str, str]:
    """Driver and clocks as nvidia-smi reports them; empty where the tool is not installed or does not answer."""
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_NVIDIA_FIELDS)}",
        "--format=csv,noheader",
        f"--id={device}",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().split(",")]
    return dict(zip(_NVIDIA_FIELDS, values, strict=False))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
