"""Peak memory, measured so that the number means something.

Resident memory (RSS) of a running process includes everything it imported before, and freed memory is seldom returned
to the system. So the honest way is a fresh process per measurement: `peak_rss_of` for a function, `peak_rss_of_command`
for a command line, both beside the `baseline` of the interpreter alone. `watch_memory` measures a block inside this
process, which is right only for what the block adds on top.

On Linux the kernel's own high-water mark (VmHWM) is used. getrusage's is not: a child inherits there the mark of the
process that started it, so a large parent would be charged to a small child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmcompress.errors import MissingError, OutOfMemory, UsageError

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes: the highest resident memory, and the resident memory before the work started."""

    peak: int
    baseline: int
    seconds: float
    result: Any = None

    @property
    def added(self) -> int:
        """What the work itself took on top of the baseline."""
        return max(0, self.peak - self.baseline)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "added": self.added}


# Runs in a fresh interpreter that imports nothing of this package. The mark is reset after the imports where the kernel
# allows it (writing 5 to clear_refs), so that a spike while importing is not charged to the work.
_CHILD = """
import importlib, json, sys, time
module, function, arguments, imports, report = json.loads(sys.stdin.read())
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
for name in imports:
    importlib.import_module(name)
call = None
if module:
    call = importlib.import_module(module)
    for part in function.split("."):
        call = getattr(call, part)
try:
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")
except OSError:
    pass
baseline, start = status("VmRSS"), time.perf_counter()
result = call(*arguments) if call else None
facts = {"seconds": time.perf_counter() - start, "peak": status("VmHWM"), "baseline": baseline, "result": result}
with open(report, "w") as out:
    json.dump(facts, out)
"""

# A small interpreter that starts the command and waits for it: the mark a child inherits is then only this one's.
_WAITER = """
import json, os, resource, subprocess, sys, time
command, report = json.loads(sys.argv[1])
start = time.perf_counter()
code = subprocess.call(command)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(report, "w") as out:
    json.dump({"seconds": time.perf_counter() - start, "peak": peak, "baseline": 0, "result": code}, out)
"""


def peak_rss_of(
    target: str, args: Sequence[Any] = (), imports: Sequence[str] = (), timeout: float | None = None
) -> PeakMemory:
    """Peak RSS of ``target(*args)`` in a fresh process; `target` is ``"package.module:function"``.

    `args` and the returned value must be JSON-able (the latter comes back as `result`). `imports` are modules loaded
    before the baseline is read, so that `added` leaves them out. Raises UsageError for a target that is not of that
    form or fails, OutOfMemory when the process was killed for memory, MissingError where the system has no /proc.
    """
    module, _, function = target.partition(":")
    if target and not (module and function):
        raise UsageError(
            f"'{target}' does not name a function", hint="write package.module:function, such as json:dumps"
        )
    _require_proc()
    return _measured([sys.executable, "-c", _CHILD], [module, function, list(args), list(imports)], timeout, target)


def interpreter_baseline(imports: Sequence[str] = ()) -> int:
    """Bytes resident in a fresh interpreter once it has imported `imports`, such as ``("torch",)``."""
    return peak_rss_of("", imports=imports).baseline


def peak_rss_of_command(command: Sequence[str], timeout: float | None = None) -> PeakMemory:
    """Peak RSS of a command line, its largest child included (not their sum); `result` is its exit code.

    The command's output goes where this process's output goes; no baseline is known (0).
    """
    return _measured([sys.executable, "-S", "-c", _WAITER], list(command), timeout, command[0])


def _measured(interpreter: list[str], request: list[Any], timeout: float | None, name: str) -> PeakMemory:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        through_stdin = interpreter[-1] is _CHILD
        payload = json.dumps([*request, str(report)] if through_stdin else [request, str(report)])
        try:
            done = subprocess.run(
                interpreter if through_stdin else [*interpreter, payload],
                input=payload if through_stdin else None,
                stderr=subprocess.PIPE if through_stdin else None,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UsageError(f"'{name}' took longer than {timeout} s", hint="give a larger timeout") from error
        if report.exists():
            return PeakMemory(**json.loads(report.read_text()))
    if done.returncode == -9:
        raise OutOfMemory(f"'{name}' was killed, most likely for memory", hint="measure a smaller model or batch")
    reason = (done.stderr or "").strip().splitlines()
    raise UsageError(
        f"'{name}' failed in its own process with code {done.returncode}: {reason[-1] if reason else 'no message'}",
        hint="call it directly to see the whole traceback",
    )


class MemoryWatch:
    """What `watch_memory` fills in: bytes at the start, at the peak, and on a CUDA device."""

    def __init__(self) -> None:
        self.baseline = resident_bytes()
        self.peak = self.baseline
        self.samples = 0
        self.cuda_peak: int | None = None

    @property
    def added(self) -> int:
        return self.peak - self.baseline


@contextmanager
def watch_memory(interval: float = 0.005, cuda: bool = False) -> Iterator[MemoryWatch]:
    """Measure the peak RSS of a block in this process; with `cuda`, also torch's peak on the current device.

    A thread samples every `interval` seconds; where the kernel's high-water mark rose during the block it is exact and
    wins. Engines that allocate outside torch (TensorRT, ONNX Runtime) do not show in `cuda_peak`.
    """
    if cuda:
        torch = _cuda()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    mark = _high_water()
    watch, stop = MemoryWatch(), threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            watch.peak = max(watch.peak, resident_bytes())
            watch.samples += 1

    sampler = threading.Thread(target=sample, name="memory-watch", daemon=True)
    sampler.start()
    try:
        yield watch
    finally:
        stop.set()
        sampler.join()
        watch.peak = max(watch.peak, resident_bytes())
        if _high_water() > mark:
            watch.peak = max(watch.peak, _high_water())
        if cuda:
            torch.cuda.synchronize()
            watch.cuda_peak = int(torch.cuda.max_memory_allocated())


def resident_bytes() -> int:
    """Resident memory of this process now. Raises MissingError where the system has no /proc."""
    _require_proc()
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _high_water() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _require_proc() -> None:
    if not _STATUS.exists():
        raise MissingError("resident memory cannot be read: this system has no /proc", hint="measure memory on Linux")


def _cuda() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise MissingError("CUDA memory was asked for, and torch finds no CUDA device", hint="run 'mmc doctor'")
    return torch
