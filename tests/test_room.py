"""A model larger than memory is refused before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmcompress import checkpoint, room
from mmcompress.errors import OutOfMemory
from mmcompress.room import available, bytes_as
from tests import tiny


def test_floats_count_in_the_dtype_they_will_have(tmp_path: Path) -> None:
    tensors = {
        "half": torch.zeros(3, 5, dtype=torch.float16),
        "codes": torch.zeros(7, dtype=torch.int8),
        "places": torch.zeros(2, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert bytes_as([tmp_path / "x.safetensors"], 4) == 15 * 4 + 7 + 16
    assert bytes_as([tmp_path / "x.safetensors"], 2) == 15 * 2 + 7 + 16


def test_what_is_available_is_the_least_that_anyone_says(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available(meminfo, cgroup) is None
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:    100 kB\n")
    assert available(meminfo, cgroup) == 102_400
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("5000\n")
    assert available(meminfo, cgroup) == 102_400
    (cgroup / "memory.max").write_text("6000\n")
    assert available(meminfo, cgroup) == 1000


def test_a_model_without_room_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tiny.bundle("clip"), tmp_path / "model")
    needed = bytes_as([tmp_path / "model" / "model.safetensors"], 4)
    monkeypatch.setattr(room, "available", lambda: needed)
    checkpoint.load(tmp_path / "model")
    monkeypatch.setattr(room, "available", lambda: needed - 1)
    monkeypatch.setattr(checkpoint, "_build", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(OutOfMemory, match=r"the weights take 0\.0 GiB of memory at 32 bits") as caught:
        checkpoint.load(tmp_path / "model")
    assert "mmc quantize without --eval-data" in caught.value.hint
    assert caught.value.exit_code == 5


def test_a_model_fits_where_there_is_room_to_work_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.zeros(100, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    for free, fits in ((599, False), (600, True), (None, True)):
        monkeypatch.setattr(room, "available", lambda free=free: free)
        assert room.fits([tmp_path / "model.safetensors"], 4) == fits
    assert room.fits([tmp_path / "model.bin"], 4)
