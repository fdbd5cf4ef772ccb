"""What a killed process was writing goes when the output is written again; what a living one writes stays."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mmcompress.staging import staging
from tests.processes import PROCESSES


def write(output: Path, reached: Any) -> None:
    with staging(output) as directory:
        (directory / "half").write_text("half")
        reached.set()
        time.sleep(60)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    output, reached = tmp_path / "out", PROCESSES.Event()
    process = PROCESSES.Process(target=write, args=(output, reached))
    process.start()
    assert reached.wait(60)
    (other,) = hidden(tmp_path)
    with staging(output) as directory:
        (directory / "whole").write_text("whole")
        assert sorted(hidden(tmp_path)) == sorted([other, directory])
    assert [path.name for path in output.iterdir()] == ["whole"]
    process.kill()
    process.join()
    assert (other / "half").exists()
    with staging(output, overwrite=True) as directory:
        assert hidden(tmp_path) == [directory]
    assert not hidden(tmp_path)


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging(tmp_path / "out") as directory:  # noqa: PT012
        (directory / "half").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
