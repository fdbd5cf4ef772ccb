"""The embeddings a student is held against: computed once and kept on disk where the sample never changes, else live.

The teacher's embeddings of plain images and texts, and a frozen student tower's, are the same in every epoch. On a CPU
keeping them saves a third or more of each step, and the teacher's memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.passes.distill_data import Corpus, Rows
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.progress import Progress

CHUNK = 256
"""Rows of one file of embeddings: what is lost when a run is killed while computing them."""


@dataclass(frozen=True)
class Table:
    """Embeddings of some rows of one tower, computed once; `parts` are arrays of CHUNK rows, on disk if they have files."""

    rows: np.ndarray
    parts: Sequence[np.ndarray]
    device: torch.device

    def lookup(self, wanted: np.ndarray) -> Tensor:
        """Return the embeddings (B, C) of rows that are in the table."""
        places = np.searchsorted(self.rows, wanted)
        found = [self.parts[place // CHUNK][place % CHUNK] for place in places]
        return torch.from_numpy(np.stack(found)).to(self.device)


@dataclass(frozen=True)
class Targets:
    """Where the fixed embeddings of a batch come from."""

    teacher: dict[str, Table]
    frozen: dict[str, Table]
    """The student's own towers that do not train."""
    live: Bundle | None = None
    """The teacher, where it must see the images as they were changed for the student."""

    def student(self, rows: Rows) -> dict[str, Tensor]:
        """Return the frozen towers' embeddings of a batch: (B, C) each."""
        return {name: table.lookup(of_tower(rows, name)) for name, table in self.frozen.items()}

    def kept(self, rows: Rows, plain: bool = False) -> dict[str, Tensor]:
        """Return the teacher's embeddings that need no teacher: (B, C) each; `plain`: of unchanged images too."""
        names = [name for name in self.teacher if plain or self.live is None or name != "vision"]
        return {name: self.teacher[name].lookup(of_tower(rows, name)) for name in names}


def of_tower(rows: Rows, tower: str) -> np.ndarray:
    """Return the numbers of a batch's items for one tower: images for vision, texts for the other."""
    return rows.images if tower == "vision" else rows.texts


def item_of(corpus: Corpus, tower: str) -> Callable[[int], Any]:
    """Return what fetches one item of `corpus` for a tower: images for vision, texts for the other."""
    return corpus.image if tower == "vision" else corpus.text


@torch.no_grad()
def embed_once(
    bundle: Bundle,
    tower: str,
    rows: np.ndarray,
    item: Callable[[int], Any],
    *,
    batch_size: int,
    folder: Path | None,
    ranks: Ranks,
    progress: Progress,
    label: str,
) -> Table:
    """Compute float32 embeddings of `rows`, or read those a former run left in `folder`; several processes share the work.

    The folder's name must tell weights, data and rows apart. Batches are cut the same way each time, so that a table that was
    interrupted and one that was not are bit-equal.
    """
    starts = range(0, len(rows), CHUNK)
    files = [folder / f"{start:09d}.npy" if folder else None for start in starts]
    parts: list[np.ndarray] = []
    progress.start(label, len(rows))
    try:
        for number, (start, file) in enumerate(zip(starts, files, strict=True)):
            chunk = rows[start : start + CHUNK]
            mine = file is None or number % ranks.world == ranks.rank
            if mine and not (file and file.exists()):
                values = [
                    bundle.encode(tower, bundle.prepare(tower, [item(int(row)) for row in chunk[at : at + batch_size]]))
                    for at in range(0, len(chunk), batch_size)
                ]
                part = torch.cat(values).float().cpu().numpy()
                if file is None:
                    parts.append(part)
                else:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    staged = file.with_suffix(".partial.npy")
                    np.save(staged, part)
                    staged.replace(file)
            progress.advance(len(chunk))
    finally:
        progress.finish()
    ranks.wait()
    if folder:
        parts = [np.load(file, mmap_mode="r") for file in files if file]
    return Table(rows, parts, bundle.device)


def digest(*parts: Any) -> str:
    """Return a short name that differs when any part does: bundles by their weights, arrays by content, the rest by repr."""
    made = hashlib.sha256()
    for part in parts:
        for piece in _bytes(part):
            made.update(piece)
        made.update(b"\0")
    return made.hexdigest()[:20]


def _bytes(part: Any) -> Iterator[Any]:
    if isinstance(part, Bundle):
        for name, value in part.model.state_dict().items():
            yield name.encode()
            yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(part, np.ndarray):
        yield np.ascontiguousarray(part)
    else:
        yield repr(part).encode()
