"""Machine facts are complete, JSON-able and identify nobody; a busy machine is said to be busy."""

from __future__ import annotations

import getpass
import json
import os
import platform
from pathlib import Path

import pytest

from mmcompress.measure import machine


def test_facts_are_json_able_and_say_what_ran() -> None:
    facts = machine.machine_facts(threads=1)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == 1
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert facts["versions"]["torch"]
    assert facts["python"] == platform.python_version()


def test_facts_identify_neither_host_nor_place() -> None:
    text = json.dumps(machine.machine_facts())
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    for secret in (platform.node(), getpass.getuser()):
        assert f'"{secret}"' not in text
    assert not {"host", "hostname", "user", "node", "path"} & set(machine.machine_facts())


def test_a_machine_is_busy_when_others_take_more_than_their_share() -> None:
    assert machine.busy_warning(0.3, cores=2) is None
    assert "other programs took 0.31 of 2 cores" in str(machine.busy_warning(0.31, cores=2))
    assert machine.busy_warning(None, cores=2) is None


def test_only_what_others_take_of_our_cores_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processors, 100 ticks each: others used 250 and we 100, so 150 stay idle of the 200 that two cores of ours need."""
    stat = tmp_path / "stat"
    times = iter([os.times_result((0, 0, 0, 0, 0)), os.times_result((0.6, 0.2, 0.2, 0, 0))])
    monkeypatch.setattr(machine.os, "times", lambda: next(times))
    monkeypatch.setattr(machine.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    stat.write_text("cpu 1000 0 500 9000 100 0 0 0 0 0\n")
    later = "cpu 1300 0 550 9040 110 0 0 0 0 0\n"
    monkeypatch.setattr(machine.time, "sleep", lambda _: stat.write_text(later))
    assert machine.taken_cores(2, stat=stat) == 0.5
    assert machine.taken_cores(2, stat=tmp_path / "none") is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota_of_the_control_group(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cgroup_quota(tmp_path) == expected


def test_a_quota_cuts_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "cgroup_quota", lambda: 2.5)
    assert machine.usable_cores() == 2
    monkeypatch.setattr(machine, "cgroup_quota", lambda: None)
    assert machine.usable_cores() == 8


@pytest.mark.parametrize(
    ("asked", "threads"), [(None, 4), ("", 4), ("2", 2), ("3,1", 3), ("16", 4), ("0", 4), ("many", 4)]
)
def test_omp_num_threads_is_heeded(monkeypatch: pytest.MonkeyPatch, asked: str | None, threads: int) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert machine.default_threads() == threads
    assert machine.machine_facts()["threads"] == threads
    assert machine.machine_facts(3)["threads"] == 3


def test_model_and_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : Some CPU @ 2GHz\nflags : fpu avx2 avx512_vnni\n")
    assert machine.cpu_model(cpuinfo) == "Some CPU @ 2GHz"
    assert machine.cpu_flags(cpuinfo) == ["avx2", "avx512_vnni"]
    assert machine.cpu_flags(tmp_path / "absent") == []


def test_cuda_facts_are_none_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.cuda_facts() is None
