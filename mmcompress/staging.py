"""Outputs appear at once or not at all: everything is written into a directory beside the target, then renamed."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mmcompress.errors import UsageError

LOCK_FILE = "lock"


def partial_path(output: Path) -> Path:
    """Return where an unfinished `output` is written: a hidden sibling, so that the final rename never copies."""
    return output.parent / f".{output.name}.partial"


def refuse_existing(output: Path) -> None:
    """Raise UsageError when `output` is there already, or cannot be made; nothing a user has is ever overwritten."""
    if output.exists():
        raise UsageError(f"{output} exists", hint="choose another name, or remove it first")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"{output} cannot be made: {above.name} is a file", hint="choose another name")


def lock(directory: Path) -> IO[bytes]:
    """Hold `directory` until the returned file is closed or the process ends, however it ends.

    Raises UsageError when another process holds it.
    """
    held = (directory / LOCK_FILE).open("ab")
    try:
        import fcntl
    except ImportError:  # Windows has none; two runs on one output are then not noticed
        return held
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise UsageError(
            f"another run is writing in {directory}", hint="wait for it, or choose another name for the output"
        ) from error
    return held


def free_name(output: Path) -> Path:
    """Return `output`, or with the first number behind it that is not taken."""
    number, found = 1, output
    while found.exists():
        number += 1
        found = output.with_name(f"{output.name}-{number}")
    return found


@contextlib.contextmanager
def staging(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh directory that becomes `output` when the block succeeds and vanishes when it fails.

    Raises UsageError when `output` exists and `overwrite` is false.
    """
    if not overwrite:
        refuse_existing(output)
    clear_abandoned(output)
    directory = output.parent / f".{output.name}.writing-{os.getpid()}"
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(parents=True)
        with lock(directory):
            yield directory
            (directory / LOCK_FILE).unlink()
        publish(directory, output)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def clear_abandoned(output: Path) -> None:
    """Remove what killed processes were writing of `output`; what a living one writes it holds (see `lock`), and that stays."""
    if importlib.util.find_spec("fcntl") is None:
        return  # nobody can tell
    for left in output.parent.glob(f".{glob.escape(output.name)}.writing-*"):
        with contextlib.suppress(UsageError, FileNotFoundError):
            if (left / LOCK_FILE).exists():
                lock(left).close()
                shutil.rmtree(left, ignore_errors=True)


def publish(directory: Path, output: Path) -> None:
    """Rename `directory` to `output`, replacing an older one; the old content goes only when the new one is complete."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    if output.exists():
        old = output.parent / f".{output.name}.old-{os.getpid()}"
        os.replace(output, old)
        os.replace(directory, output)
        shutil.rmtree(old)
    else:
        os.replace(directory, output)
