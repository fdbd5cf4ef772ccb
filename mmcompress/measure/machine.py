"""The machine a number was measured on: what it is, which versions ran, and whether it was busy.

Nothing here identifies a person or a host: no host name, no user, no path, no serial number. Versions are read from the
installed metadata, so that recording them imports no runtime.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

BUSY_SHARE = 0.15
"""When other programs take more than this of the usable cores, they are likely to disturb a timing."""
LOOK = 0.3
"""Seconds for which other programs are watched."""

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


def default_threads() -> int:
    """CPU threads of what is not told otherwise: as many as OMP_NUM_THREADS says, but no more than there are usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(int(asked), usable_cores()) if asked.isdigit() and int(asked) else usable_cores()


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


def taken_cores(cores: int, seconds: float = LOOK, stat: Path = Path("/proc/stat")) -> float | None:
    """Cores, of the `cores` this process may use, that other programs take now; None where the system does not tell.

    The load average would not do: it is a minute late, and counts what this very process did before. Watched are the ticks
    of all processors that are neither idle nor ours; only when too few are left idle do the others take anything.
    """
    before = _ticks(stat)
    if before is None:
        return None
    time.sleep(seconds)
    after = _ticks(stat)
    assert after is not None, "it was there before"
    (busy, whole, own), (busy_before, whole_before, own_before) = after, before
    processors = os.cpu_count() or 1
    others = max(0.0, busy - busy_before - (own - own_before)) / max(1.0, whole - whole_before) * processors
    return round(min(float(cores), max(0.0, cores - (processors - others))), 2)


def _ticks(stat: Path) -> tuple[float, float, float] | None:
    """Ticks of all processors that were not idle, all their ticks, and this process's own with its children's."""
    line = _read(stat).split("\n", 1)[0].split()
    if not line or line[0] != "cpu":
        return None
    ticks = [float(part) for part in line[1:9]]  # user nice system idle iowait irq softirq steal; guests are in user
    times = os.times()
    own = sum((times.user, times.system, times.children_user, times.children_system)) * os.sysconf("SC_CLK_TCK")
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), own


def busy_warning(taken: float | None, cores: int) -> str | None:
    """One line when other programs take too much for a timing to be trusted, else None."""
    if taken is None or taken <= BUSY_SHARE * cores:
        return None
    return (
        f"the machine was busy: other programs took {taken:.2f} of {cores} cores; "
        "ratios from interleaved rounds may hold, absolute times may not"
    )


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """Facts to store beside every measurement; JSON-able. It watches other programs for LOOK seconds: call it right
    before measuring.

    `threads` is what the measurement was told to use. Keys: cpu, cores, threads, flags, memory_mib, os, python,
    versions, cuda (None without a device), taken_cores (by other programs), busy (None or a warning).
    """
    cores = usable_cores()
    taken = taken_cores(cores)
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "threads": default_threads() if threads is None else threads,
        "flags": cpu_flags(),
        "memory_mib": memory_mib(),
        "os": " ".join([platform.system(), ".".join(platform.release().split(".")[:2]), platform.machine()]),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "cuda": cuda_facts(),
        "taken_cores": taken,
        "busy": busy_warning(taken, cores),
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
