"""Folders of images and audio: with a metadata.jsonl (Hugging Face's ImageFolder and AudioFolder), or one folder a class.

Nothing outside the folder is ever read: names with ``..``, absolute names and links that lead out are refused.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath

from mmcompress.data.rows import Row, parse_json, parse_row
from mmcompress.data.sample import (
    AUDIO_SUFFIXES,
    FRAME_RATE,
    IMAGE_SUFFIXES,
    MAX_FRAMES,
    Audio,
    Sample,
    Stored,
    Video,
)
from mmcompress.errors import UsageError

METADATA = "metadata.jsonl"


class MetadataFolder:
    """A folder with a metadata.jsonl; the index holds 16 bytes a sample, the line's position and number.

    Opening reads every line once and looks at every file's size, so that a mistake in the last line is found before an
    hour of computing. Raises UsageError naming the line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / METADATA
        self._starts, self._numbers = array("Q"), array("Q")
        first_lines: dict[str, int] = {}
        for number, start, line in self._lines():
            sample = self._sample(line, number)
            earlier = first_lines.setdefault(sample.key, number)
            if earlier != number:
                raise UsageError(
                    f"{self.path} lines {earlier} and {number} both name '{sample.key}'",
                    hint='several captions of a file go into a list: "texts": [...]; several questions about it each need '
                    'their own "id"',
                )
            self._starts.append(start)
            self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Sample:
        """Return sample `index`. Raises UsageError when its line or its file changed into something unusable."""
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            return self._sample(file.readline(), self._numbers[index])

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, start, line
                start += len(line)

    def _sample(self, line: bytes, number: int) -> Sample:
        where = f"{self.path} line {number}"
        row = parse_row(parse_json(line, where), where, strict=True)
        if not row.files and not row.texts and not row.frames:
            raise UsageError(f"{where} has neither file_name nor text", hint='write "file_name": "picture.png"')
        stored = [stored_inside(self.folder, name, where) for name in row.files]
        names = [row.frames] if isinstance(row.frames, str) else row.frames
        key = row.key or next(iter([*row.files, *names]), f"line {number}")
        return make_sample(key, row, stored, self._frames(row, where))

    def _frames(self, row: Row, where: str) -> list[Stored]:
        if not isinstance(row.frames, str):
            return [stored_inside(self.folder, name, where) for name in row.frames]
        folder = self.folder / row.frames
        if escapes(row.frames) or not folder.is_dir():
            raise UsageError(
                f"{where} names '{row.frames}' for its frames, which is no folder inside the data folder",
                hint='name a folder of numbered images, or list them: "frames": ["0001/1.png", "0001/2.png"]',
            )
        names = in_order(_images(folder), f"{where}: {row.frames}")
        return [stored_inside(self.folder, f"{row.frames}/{name}", where) for name in names]


class ClassFolder:
    """Images sorted into one folder a class, or lying in one folder without labels; the index holds their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = [
            f"{sub.name}/{name}" for sub in _listed(folder) if sub.is_dir() for name in _images(sub)
        ] or _images(folder)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Sample:
        """Return sample `index`. Raises UsageError when its file is gone."""
        name = self._names[index]
        label = name.split("/")[0] if "/" in name else None
        return make_sample(name, Row(label=label), [stored_inside(self.folder, name, str(self.folder))], [])


def make_sample(key: str, row: Row, stored: list[Stored], frames: list[Stored]) -> Sample:
    """Return the sample of a metadata row and its files, told apart by their suffix, and the frames of its video.

    Raises UsageError for a file that is neither picture nor sound, for two recordings, and for frames that make no video.
    """
    for frame in frames:
        if _suffix(frame) not in IMAGE_SUFFIXES:
            raise UsageError(
                f"{frame} is no image by its name, and a video is read as its frames",
                hint="write the frames as images first, such as with ffmpeg -i video.mp4 -r 2 frames/%04d.png",
            )
    pictures = [item for item in stored if _suffix(item) in IMAGE_SUFFIXES]
    sounds = [item for item in stored if _suffix(item) in AUDIO_SUFFIXES]
    for item in stored:
        if item not in pictures and item not in sounds:
            raise UsageError(
                f"{item} is neither an image nor audio by its name",
                hint="known: " + " ".join(sorted(IMAGE_SUFFIXES | AUDIO_SUFFIXES)),
            )
    if len(sounds) > 1:
        raise UsageError(f"sample '{key}' has several recordings", hint="give each its own sample")
    return Sample(
        key=key,
        texts=row.texts,
        label=row.label,
        group=row.group,
        tags=row.tags,
        audio=Audio(sounds[0], row.sampling_rate) if sounds else None,
        picture=pictures[0] if pictures else None,
        question=row.question,
        turns=row.turns,
        further=tuple(pictures[1:]),
        video=_video(key, frames, row.frame_rate) if frames else None,
    )


def _video(key: str, frames: list[Stored], rate: float | None) -> Video:
    if len(frames) > MAX_FRAMES:
        raise UsageError(
            f"sample '{key}' has {len(frames)} frames; at most {MAX_FRAMES} are taken",
            hint="keep every second or third frame, and write as many fewer frames per second (fps)",
        )
    return Video(tuple(frames), FRAME_RATE if rate is None else rate)


def frames_of(folder: Path) -> list[Stored]:
    """Return the images of a folder as frames, by their numbers. Raises UsageError where it has none, or one is missing."""
    if not folder.is_dir():
        raise UsageError(f"no folder at '{folder}'", hint="give a folder of numbered images, one a frame")
    return [stored_inside(folder, name, str(folder)) for name in in_order(_images(folder), str(folder))]


def in_order(names: Sequence[str], where: str) -> list[str]:
    """Return the names of frames by the last number in each, which must rise in equal steps (0, 5, 10 where others were left out).

    Raises UsageError naming `where` for none, for a name without a number, and where a number is missing or there twice.
    """
    if not names:
        raise UsageError(f"{where} holds no frames", hint="write numbered images into it, such as 0001.png")
    numbered = []
    for name in names:
        found = re.findall(r"[0-9]+", PurePosixPath(name).stem)
        if not found:
            raise UsageError(f"{where} holds '{name}', which has no number", hint="name frames like 0001.png")
        numbered.append((int(found[-1]), name))
    numbered.sort()
    step = min((after - before for (before, _), (after, _) in pairwise(numbered)), default=1)
    for (before, first), (after, second) in pairwise(numbered):
        if not step and before == after:
            raise UsageError(f"{where}: frames '{first}' and '{second}' have one number", hint="number each frame once")
        if step and after - before != step:
            raise UsageError(
                f"{where}: frame {before + step} is missing between '{first}' and '{second}'",
                hint="add it, or number the frames anew",
            )
    return [name for _, name in numbered]


def stored_inside(folder: Path, name: str, where: str) -> Stored:
    """Return the file `name` of `folder`. Raises UsageError when it does not exist or lies outside the folder."""
    if escapes(name):
        raise UsageError(f"{where} names '{name}', which leads out of the data folder", hint="use names inside it")
    path = folder / name
    try:
        resolved, size = path.resolve(strict=True), path.stat().st_size
    except OSError as error:
        raise UsageError(
            f"{where} names '{name}', which does not exist", hint="add the file or remove the entry"
        ) from error
    if not resolved.is_relative_to(folder.resolve()):
        raise UsageError(
            f"{where} names '{name}', a link that leads out of the data folder", hint="copy the file into the folder"
        )
    if not resolved.is_file():
        raise UsageError(f"{where} names '{name}', which is not a file", hint="name an image or audio file")
    return Stored(path, size)


def escapes(name: str) -> bool:
    """Whether a file name from metadata or an archive points outside the place it belongs to."""
    pure = PureWindowsPath(name)  # takes both slashes, and knows drives
    return bool(pure.anchor) or not pure.parts or ".." in pure.parts or "\0" in name


def _suffix(stored: Stored) -> str:
    return PurePosixPath(str(stored)).suffix.lower()


def _listed(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def _images(folder: Path) -> list[str]:
    return [path.name for path in _listed(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
