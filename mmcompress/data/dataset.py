"""A dataset: a source that reads sample i, and which samples of it are meant, in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from mmcompress.data.classes import ZeroShot
from mmcompress.data.sample import Sample
from mmcompress.errors import UsageError


class Source(Protocol):
    """Random access to samples; holds an index at most, never pictures."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Return sample `index`, 0 <= index < len. Raises UsageError when its files are damaged."""


@dataclass(frozen=True)
class Memory:
    """Samples made in Python."""

    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample:
        return self.samples[index]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An ordered, re-iterable selection of samples; one sample at a time is in memory while iterating."""

    source: Source
    name: str = "data"
    zero_shot: ZeroShot | None = None
    """The classes and prompts that came with the data."""
    chosen: Sequence[int] | None = None
    """Indices into the source; None means all."""

    def __len__(self) -> int:
        return len(self.source) if self.chosen is None else len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        return self.source.read(index if self.chosen is None else self.chosen[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def take(self, n: int) -> Dataset:
        """Return the first `n` samples, all when there are fewer. Raises UsageError for n < 1."""
        return self._select(np.arange(len(self))[: _at_least_one(n)])

    def subset(self, n: int, seed: int = 0) -> Dataset:
        """Return `n` samples chosen at random by `seed`, in their original order; all when there are fewer.

        Raises UsageError for n < 1.
        """
        count = min(_at_least_one(n), len(self))
        return self._select(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def apart(self, n: int, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Return `n` samples chosen at random by `seed`, and the others; both in their original order."""
        assert 0 < n < len(self), f"{n} of {len(self)} samples leave nothing"
        drawn = np.random.default_rng(seed).permutation(len(self))
        return self._select(np.sort(drawn[:n])), self._select(np.sort(drawn[n:]))

    def fingerprint(self) -> str:
        """Return a sha256 over keys, sizes, texts, labels and questions: equal for the same data in the same order, anywhere."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for sample in self:
            line = [sample.key, sample.size, sample.texts, sample.label, sample.group, sample.tags]
            if sample.question or sample.turns:
                line += [sample.question, sample.turns]
            if sample.further or sample.video:
                video = sample.video
                line += [len(sample.pictures), (len(video.frames), video.rate) if video else None]
            digest.update(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def _select(self, rows: np.ndarray) -> Dataset:
        known = rows if self.chosen is None else np.asarray(self.chosen)[rows]
        return Dataset(self.source, self.name, self.zero_shot, tuple(int(row) for row in known))


def batches(dataset: Dataset, size: int) -> Iterator[list[Sample]]:
    """Yield lists of `size` samples in order, the last one shorter. Raises UsageError for size < 1."""
    if size < 1:
        raise UsageError(f"batch size {size} is below 1", hint="use 1 or more")
    for start in range(0, len(dataset), size):
        yield [dataset[index] for index in range(start, min(start + size, len(dataset)))]


def _at_least_one(n: int) -> int:
    if n < 1:
        raise UsageError(f"{n} samples asked for; at least 1 is needed", hint="use 1 or more")
    return n
