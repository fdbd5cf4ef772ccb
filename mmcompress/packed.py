"""Data that comes with the package, packed: a tar of small files is half padding. It is unpacked once, into the user's cache."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path

from mmcompress.errors import UsageError


def cache_dir() -> Path:
    """Return where what can be made again is kept: $MMC_CACHE_DIR, or ~/.cache/mmcompress. Raises UsageError where it cannot be."""
    chosen = os.environ.get("MMC_CACHE_DIR")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mmcompress"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"no cache can be made at {folder}: {error.strerror}", hint="set MMC_CACHE_DIR to a folder you can write to"
        ) from error
    return folder


def unpacked(packed: Path) -> Path:
    """Return the file that `packed`, a .gz, holds; made where the cache has none of these bytes. Raises UsageError."""
    content = packed.read_bytes()
    name = Path(packed.stem)  # test.tar
    target = cache_dir() / f"{name.stem}-{hashlib.sha256(content).hexdigest()[:12]}{name.suffix}"
    if target.is_file():
        return target
    try:
        whole = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{packed} is damaged: {error}", hint="install mmcompress again") from error
    # Two processes may do this at once: each writes its own, and the last to be renamed stays.
    staging = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        staging.write_bytes(whole)
        os.replace(staging, target)
    except OSError as error:
        raise UsageError(
            f"{packed.name} cannot be unpacked into {target.parent}: {error.strerror}",
            hint="make room there, or set MMC_CACHE_DIR to another folder",
        ) from error
    finally:
        staging.unlink(missing_ok=True)
    return target
