"""Peak memory laws: what was allocated is seen, what the parent holds is not charged, failures are told."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from mmcompress.errors import MissingError, OutOfMemory, UsageError
from mmcompress.measure import memory

MIB = 2**20

HOG = """
import os, signal
def touch(mib):
    block = bytearray(mib * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    return len(block)
def fail():
    raise ValueError("no such weights")
def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def hog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory_hog.py").write_text(HOG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_fresh_process_shows_what_the_function_took(hog: None) -> None:
    found = memory.peak_rss_of("memory_hog:touch", [100])
    assert found.result == 100 * MIB
    assert 99 * MIB <= found.added < 108 * MIB  # the kernel counts pages with a small lag
    assert found.seconds > 0
    assert found.to_json()["added"] == found.added


def test_memory_of_the_parent_is_not_charged_to_the_child(hog: None) -> None:
    before = memory.peak_rss_of("memory_hog:touch", [1]).peak
    ballast = bytearray(b"x" * (200 * MIB))
    assert memory.peak_rss_of("memory_hog:touch", [1]).peak < before + 20 * MIB
    command = memory.peak_rss_of_command([sys.executable, "-c", "pass"])
    assert command.result == 0
    assert command.peak < 60 * MIB
    assert len(ballast) == 200 * MIB


def test_imports_belong_to_the_baseline() -> None:
    plain, with_numpy = memory.interpreter_baseline(), memory.interpreter_baseline(["numpy"])
    assert with_numpy > plain + 5 * MIB


def test_a_command_is_measured_with_its_exit_code() -> None:
    program = "import sys; block = b'x' * (60 * 2**20); sys.exit(3)"
    found = memory.peak_rss_of_command([sys.executable, "-c", program])
    assert found.result == 3
    assert found.peak > 60 * MIB


def test_failures_are_told(hog: None) -> None:
    with pytest.raises(UsageError, match="ValueError: no such weights"):
        memory.peak_rss_of("memory_hog:fail")
    with pytest.raises(UsageError, match="does not name a function"):
        memory.peak_rss_of("memory_hog")
    with pytest.raises(OutOfMemory, match="killed"):
        memory.peak_rss_of("memory_hog:be_killed")
    with pytest.raises(UsageError, match=r"longer than 0\.5 s"):
        memory.peak_rss_of("time:sleep", [30], timeout=0.5)


def test_the_watch_sees_a_block_that_is_already_freed() -> None:
    with memory.watch_memory(interval=0.002) as watch:
        block = bytearray(b"x" * (80 * MIB))
        time.sleep(0.05)
        del block
    assert watch.added > 70 * MIB
    assert watch.samples > 2
    assert watch.cuda_peak is None


def test_the_sampler_alone_sees_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_high_water", lambda: 0)  # as on a block below an earlier, higher mark
    with memory.watch_memory(interval=0.002) as watch:
        block = bytearray(b"x" * (80 * MIB))
        time.sleep(0.05)
        del block
    assert watch.added > 70 * MIB


def test_the_watch_ends_when_the_block_fails() -> None:
    with pytest.raises(KeyError), memory.watch_memory() as watch:
        raise KeyError("inside")
    assert watch.peak >= watch.baseline


def test_what_the_system_cannot_tell_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    with pytest.raises(MissingError, match="no /proc"):
        memory.resident_bytes()


def test_cuda_peak_without_a_device_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match="no CUDA device"), memory.watch_memory(cuda=True):
        pass
