"""Tar shards in the webdataset layout: members that share their name up to the first dot are one sample.

``0001.png`` ``0001.txt`` ``0001.json`` ``0001.cls`` are the picture, its captions (one a line), the same columns as a
line of metadata.jsonl, and its class. Several pictures are numbered, ``0001.1.png`` ``0001.2.png``, and so are the frames of a
video, ``0001.frames.0001.png``: numbers count, so that 10 comes after 9. Members of a sample lie next to each other, as in
webdataset. Nothing is extracted: the index is 14 bytes a sample, made by hopping from header to header once.
"""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mmcompress.data import classes
from mmcompress.data.folder import escapes, in_order, make_sample
from mmcompress.data.rows import Row, parse_json, parse_row
from mmcompress.data.sample import AUDIO_SUFFIXES, IMAGE_SUFFIXES, Sample, Stored
from mmcompress.errors import UsageError

BLOCK = 512
# Behind its last member a tar has zeros only, two blocks of them and padding up to 10 KiB; more of it need not be read.
TAIL = 2**16
FRAMES = "frames."
NUMBERED = re.compile(r"(?:image|img)?_?([0-9]+)\.[a-z]+")


class TarShards:
    """Samples of one or more tar files, in the order of the files and of their members.

    Raises UsageError for a file that is not a tar, is truncated, or holds links or names that lead out of it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.zero_shot: classes.ZeroShot | None = None
        self._shards, self._starts, self._counts = array("I"), array("Q"), array("H")
        self._prefixes = _prefixes(self.paths)
        for number, path in enumerate(self.paths):
            self._scan(number, path)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Sample:
        """Return sample `index`. Raises UsageError when the shard changed or the sample's metadata is wrong."""
        number = self._shards[index]
        path = self.paths[number]
        members: dict[str, Stored] = {}
        key = ""
        with open(path, "rb") as file:
            file.seek(self._starts[index])
            for member in _files(file, path):
                key, extension = split_name(member.name)
                members[extension] = _stored(path, member)
                if len(members) == self._counts[index]:
                    break
        if len(members) != self._counts[index]:
            raise UsageError(f"{path} changed while it was being read", hint="open the data again")
        return _sample(self._prefixes[number] + key, members)

    def _scan(self, number: int, path: Path) -> None:
        seen: set[str] = set()
        current, extensions, end = "", set[str](), 0
        with open(path, "rb") as file:
            for member in _files(file, path):
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if PurePosixPath(member.name).name == classes.FILE_NAME:
                    where = f"{path}:{member.name}"
                    content = _stored(path, member).read()
                    self.zero_shot = classes.parse_classes(parse_json(content, where), where)
                    continue
                key, extension = split_name(member.name)
                if key != current:
                    if key in seen:
                        raise UsageError(
                            f"{path}: the members of '{key}' do not lie next to each other",
                            hint="write the shard sorted by name (tar --sort=name)",
                        )
                    seen.add(key)
                    self._shards.append(number)
                    self._starts.append(member.offset)
                    self._counts.append(0)
                    current, extensions = key, set()
                if extension in extensions:
                    raise UsageError(f"{path} holds '{member.name}' twice", hint="write every member once")
                extensions.add(extension)
                self._counts[-1] += 1
            file.seek(end)
            tail = file.read(TAIL)
        if len(tail) < BLOCK or tail.strip(b"\0"):
            raise UsageError(f"{path} is truncated or damaged after byte {end:,}", hint="copy or write the shard again")


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member: the folder and name up to the first dot, and the rest in lower case."""
    pure = PurePosixPath(name)
    stem, _, extension = pure.name.partition(".")
    return str(pure.with_name(stem)) if stem else str(pure), extension.lower()


def _files(file: Any, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files from the position of `file` on."""
    try:
        tar = tarfile.TarFile(fileobj=file)
        while (member := tar.next()) is not None:
            # tarfile remembers every member it has seen; a shard may have a million.
            tar.members.clear()  # type: ignore[attr-defined]
            hidden = PurePosixPath(member.name).name.startswith((".", "__"))
            if member.isdir() or hidden:
                continue
            if escapes(member.name):
                raise UsageError(f"{path} holds '{member.name}', which leads out of it", hint="use plain names")
            if not member.isfile() or member.issparse():
                raise UsageError(
                    f"{path} holds '{member.name}', which is a link, device or sparse file",
                    hint="write the shard with plain files (tar --dereference)",
                )
            yield member
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(
            f"{path} is not a readable tar: {error}", hint="copy or write the shard again, uncompressed"
        ) from error


def _stored(path: Path, member: tarfile.TarInfo) -> Stored:
    return Stored(path, member.size, member.offset_data, f"{path}:{member.name}")


def _sample(key: str, members: dict[str, Stored]) -> Sample:
    names = [name for name in members if "." + name.rpartition(".")[2] in IMAGE_SUFFIXES | AUDIO_SUFFIXES]
    media = [members[name] for name in names if "." not in name]
    if len([item for item in media if PurePosixPath(str(item)).suffix.lower() in IMAGE_SUFFIXES]) > 1:
        raise UsageError(f"sample '{key}' has several images", hint="number them: 0001.1.png, 0001.2.png")
    media += [members[name] for name in sorted(filter(NUMBERED.fullmatch, names), key=_number)]
    frames = [name for name in names if name.startswith(FRAMES)]
    row = Row()
    if "json" in members:
        stored = members["json"]
        row = parse_row(parse_json(stored.read(), str(stored)), str(stored), strict=False)
    if "txt" in members:
        lines = (line.strip() for line in _text(members["txt"]).splitlines())
        row = replace(row, texts=tuple(dict.fromkeys((*filter(None, lines), *row.texts))))
    if "cls" in members:
        row = replace(row, label=_text(members["cls"]).strip())
    if not media and not row.texts and not frames:
        first = next(iter(members.values()))
        raise UsageError(f"{first} belongs to no image, audio or text", hint="remove it from the shard")
    ordered = in_order(frames, f"sample '{key}'") if frames else []
    return make_sample(key, row, media, [members[name] for name in ordered])


def _number(name: str) -> int:
    found = NUMBERED.fullmatch(name)
    assert found is not None, "only numbered members are sorted"
    return int(found[1])


def _text(stored: Stored) -> str:
    try:
        return stored.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{stored} is not UTF-8 text: {error}", hint="write it in UTF-8") from error


def _prefixes(paths: Sequence[Path]) -> list[str]:
    """Return what tells equal keys of several shards apart: the shard's name, with its folder where names repeat."""
    if len(paths) == 1:
        return [""]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.stem}" for path in paths]
    return [name + "/" for name in names]
