"""From what a user names to a dataset: a folder, tar shards, or the drawings that come with the package."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from mmcompress.data.classes import FILE_NAME, ZeroShot, read_classes
from mmcompress.data.dataset import Dataset, Source
from mmcompress.data.folder import METADATA, ClassFolder, MetadataFolder
from mmcompress.data.shards import TarShards
from mmcompress.errors import MissingError, UsageError, closest
from mmcompress.packed import unpacked

DEMO = ("demo:test", "demo:train")
LAYOUTS = f"give a folder with {METADATA}, a folder of class folders, or .tar shards"


def open_data(spec: str | Path, classes: str | Path | None = None) -> Dataset:
    """Open the data `spec` names.

    `spec` is a folder with metadata.jsonl, a folder with one folder a class, a folder of images, a tar shard, a folder of
    shards, a pattern of shards (``data-{000..012}.tar``, ``data-*.tar``), or ``demo:test`` / ``demo:train``. Zero-shot
    classes come from `classes`, else from a classes.json beside the data, if there is one. Raises UsageError saying what is
    wrong with the data, MissingError when this installation has no demo data.
    """
    name = str(spec)
    source, home = _demo(name) if name.startswith("demo:") else _source(name)
    if len(source) == 0:
        raise UsageError(f"{name} holds no samples", hint=LAYOUTS)
    return Dataset(source, name if name.startswith("demo:") else Path(name).name, _classes(source, home, classes))


def expand(pattern: str) -> list[Path]:
    """Return the files a pattern names: braces in the order written, ``*`` sorted.

    Raises UsageError when it names none, or when one that braces name is missing.
    """
    found: list[Path] = []
    for name in _braces(pattern):
        if any(letter in name for letter in "*?["):
            found += [Path(path) for path in sorted(glob.glob(name))]
        elif Path(name).exists():
            found.append(Path(name))
        else:
            raise UsageError(f"{name} does not exist (from {pattern})", hint="check the numbers in the braces")
    if not found:
        raise UsageError(f"no file matches {pattern}", hint="check the pattern; quote it in the shell")
    return found


def _demo(name: str) -> tuple[Source, Path]:
    if name not in DEMO:
        raise UsageError(f"there is no demo data '{name}'", hint=closest(name, DEMO))
    home = Path(str(resources.files("mmcompress") / "demo"))
    path = home / f"{name.removeprefix('demo:')}.tar.gz"
    if not path.is_file():
        raise MissingError(f"{name} is not part of this installation", hint="give your own data with --data")
    return TarShards([unpacked(path)]), home


def _source(name: str) -> tuple[Source, Path]:
    path = Path(name)
    if not path.exists():
        if any(letter in name for letter in "*?[{"):
            paths = expand(name)
            return TarShards([_tar(found) for found in paths]), paths[0].parent
        raise UsageError(f"{name} does not exist", hint=LAYOUTS + ", or " + " or ".join(DEMO))
    if path.is_dir():
        return _folder(path), path
    if path.name == METADATA:
        return MetadataFolder(path.parent), path.parent
    return TarShards([_tar(path)]), path.parent


def _folder(folder: Path) -> Source:
    if (folder / METADATA).is_file():
        return MetadataFolder(folder)
    shards = sorted(folder.glob("*.tar"))
    if shards:
        return TarShards(shards)
    if (folder / "metadata.csv").is_file():
        raise UsageError(f"{folder} has a metadata.csv, which is not read", hint=f"write it as {METADATA}")
    splits = sorted(sub.parent.name for sub in folder.glob(f"*/{METADATA}"))
    if splits:
        raise UsageError(f"{folder} holds the splits {', '.join(splits)}", hint=f"name one: {folder / splits[0]}")
    return ClassFolder(folder)


def _tar(path: Path) -> Path:
    if path.suffix.lower() != ".tar":
        packed = ".tar." in path.name or path.suffix.lower() == ".tgz"
        raise UsageError(f"{path} is not a .tar file", hint="unpack it to a plain .tar first" if packed else LAYOUTS)
    return path


def _classes(source: Source, home: Path, given: str | Path | None) -> ZeroShot | None:
    if given is not None:
        return read_classes(Path(given))
    if isinstance(source, TarShards) and source.zero_shot is not None:
        return source.zero_shot
    return read_classes(home / FILE_NAME) if (home / FILE_NAME).is_file() else None


def _braces(pattern: str) -> Iterator[str]:
    """Yield `pattern` with each ``{a..b}`` and ``{x,y}`` replaced in turn, the leftmost varying slowest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])
