"""Small datasets on disk for the tests of this folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

RED = (255, 0, 0)


def png(color: tuple[int, ...] = RED, size: tuple[int, int] = (4, 3), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def image_folder(folder: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """Write metadata.jsonl with `rows` (a str is written as it is) and a picture for every file they name."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if not isinstance(row, str) and "file_name" in row and not Path(row["file_name"]).is_absolute():
            path = folder / row["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png())
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def shard(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
