"""Files of a run's working place: what is too much for memory, or too dear to be computed twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

ENDING = ".safetensors"


class Kept(MutableMapping[str, Tensor]):
    """Tensors by name, each a file in one directory: read when asked for, whole or absent after a kill.

    What is deleted is gone from the mapping, not from the directory: a run that goes on begins with it.
    """

    def __init__(self, directory: Path) -> None:
        """Hold what an earlier run has put into `directory`, which is made where it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.deleted: set[str] = set()
        self._names = {file.name.removesuffix(ENDING) for file in directory.glob(f"*{ENDING}")}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return load_file(self._file(name))["value"]

    def __setitem__(self, name: str, value: Tensor) -> None:
        writing = self._file(name).with_suffix(f".{os.getpid()}")
        save_file({"value": value.detach().cpu().contiguous()}, writing)
        writing.replace(self._file(name))
        self._names.add(name)
        self.deleted.discard(name)

    def __delitem__(self, name: str) -> None:
        self._names.remove(name)
        self.deleted.add(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}{ENDING}"


def write_atomically(file: Path, text: str) -> None:
    """Write a file that is either complete or absent."""
    temporary = file.with_name(file.name + ".writing")
    temporary.write_text(text)
    temporary.replace(file)
