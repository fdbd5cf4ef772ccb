"""`mmc quantize` without data: what it prints of a model it never had in memory."""

from __future__ import annotations

from pathlib import Path

from mmcompress import checkpoint
from tests import tiny
from tests.cli.conftest import Mmc


def test_the_command_says_what_came_out(mmc: Mmc, tmp_path: Path) -> None:
    checkpoint.save(tiny.bundle("llava_clip"), tmp_path / "model")
    (tmp_path / "model" / "mmc.json").unlink()
    done = mmc("quantize", tmp_path / "model", "-o", tmp_path / "out", "--scheme", "W8A16")
    assert done.code == 0, done.err
    assert "accuracy was not measured" in done.out
    assert "smaller by a factor of" in done.out
    assert "layer by layer" in done.err
