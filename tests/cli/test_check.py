"""`mmc check` as a command: exit codes, files and the document of --json."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Mmc
from tests.jobs.outputs import output


def test_exit_codes_files_and_document(mmc: Mmc, tmp_path: Path) -> None:
    base = output(tmp_path / "base")
    passed = mmc("check", base, "--baseline", base, "--json")
    assert (passed.code, passed.document["passed"]) == (0, True)
    worse = output(tmp_path / "worse", noise=3.4)
    files = {"--junit": tmp_path / "check.xml", "--markdown": tmp_path / "check.md"}
    words = [word for pair in files.items() for word in pair]
    found = mmc("check", worse, "--baseline", base, "--max-slowdown", "10%", "--json", *words)
    assert found.code == 3
    assert found.document["exit_code"] == 3
    assert found.document["passed"] is False
    assert found.document["limits"]["max_slowdown"] == pytest.approx(0.1)
    assert found.error.startswith("accuracy: retrieval")
    assert all(path.exists() for path in files.values())
    assert mmc("check", worse, "--baseline", base, "--max-slowdown", "fast").code == 2
