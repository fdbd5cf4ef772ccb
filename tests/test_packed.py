"""What comes packed is unpacked once, whole, and where the user says."""

import gzip
import os
from pathlib import Path

import pytest

from mmcompress.errors import UsageError
from mmcompress.packed import cache_dir, unpacked


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMC_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "few.tar.gz"
    file.write_bytes(gzip.compress(b"drawings", mtime=0))
    return file


def test_it_is_unpacked_once(packed: Path) -> None:
    made = unpacked(packed)
    assert made.parent == cache_dir()
    assert made.suffix == ".tar"
    assert made.read_bytes() == b"drawings"
    os.utime(made, (1, 1))
    assert unpacked(packed) == made
    assert made.stat().st_mtime == 1
    assert os.listdir(cache_dir()) == [made.name]  # nothing half-written lies about


def test_other_bytes_are_another_file(packed: Path) -> None:
    first = unpacked(packed)
    packed.write_bytes(gzip.compress(b"other drawings", mtime=0))
    assert unpacked(packed) != first
    assert unpacked(packed).read_bytes() == b"other drawings"


def test_damaged_bytes_leave_nothing(packed: Path) -> None:
    for content in (packed.read_bytes()[:-6], b"no gzip", packed.read_bytes()[:12] + b"xx" + packed.read_bytes()[14:]):
        packed.write_bytes(content)
        with pytest.raises(UsageError, match=r"few\.tar\.gz is damaged"):
            unpacked(packed)
        assert not os.listdir(cache_dir())


def test_others_may_read_it(packed: Path) -> None:
    mask = os.umask(0o022)
    try:
        assert unpacked(packed).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_a_cache_that_cannot_be_made_says_what_to_set(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packed.parent / "file").touch()
    monkeypatch.setenv("MMC_CACHE_DIR", str(packed.parent / "file" / "below"))
    with pytest.raises(UsageError, match="no cache can be made at .*below: Not a directory") as caught:
        unpacked(packed)
    assert "MMC_CACHE_DIR" in caught.value.hint
