"""What a distillation step sees: which samples, in which order, changed how, ready for the towers.

Everything random is a function of (seed, epoch, sample), never of what ran before. So a resumed run, and a run on a different
number of processes, see the same batches, and no random state has to be saved.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError

if TYPE_CHECKING:
    from mmcompress.data import Dataset

T = TypeVar("T")
HELD_BACK = 64
"""Samples kept out of training at most."""


@dataclass(frozen=True)
class Rows:
    """One batch by number. `images` are samples, `texts` distinct texts of a `Corpus`; both (B,), or one of them empty."""

    images: np.ndarray
    texts: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """An index over a dataset: where its images and its distinct texts are; 16 bytes a caption, no pictures, no texts."""

    data: Dataset
    paired: bool
    """Whether image i comes with text i. If not, images and texts are drawn from the data independently."""
    train: Rows
    """The samples to train on: `images` sample numbers; `texts` the same numbers if paired, else distinct texts."""
    held: Rows
    """Samples kept out of training, with their texts, to measure on."""
    captions: np.ndarray
    """The distinct text behind every caption of the data, in order."""
    offsets: np.ndarray
    """Sample i has captions offsets[i] to offsets[i + 1]."""
    origin: np.ndarray
    """(distinct texts, 2): the sample and caption number where each distinct text is found."""

    def image(self, row: int) -> Image.Image:
        return self.data[row].image

    def text(self, row: int) -> str:
        sample, number = self.origin[row]
        return self.data[int(sample)].texts[int(number)]

    @property
    def size(self) -> int:
        """How many training samples one epoch has."""
        return max(len(self.train.images), len(self.train.texts))

    @property
    def samples(self) -> int:
        """How many samples the data has."""
        return len(self.offsets) - 1

    @property
    def pairs(self) -> int:
        """How many samples have both an image and a text."""
        images = np.union1d(self.train.images, self.held.images)
        return int((np.diff(self.offsets)[images] > 0).sum())

    def batch(self, start: int, count: int, seed: int) -> Rows:
        """Return training samples `start` to `start + count` of the endless sequence of shuffled epochs."""
        places = np.arange(start, start + count)
        images = shuffled(self.train.images, places, seed)
        if not self.paired:
            return Rows(images, shuffled(self.train.texts, places, seed + 1))
        epochs = places // max(1, self.size)
        return Rows(
            images, np.array([self._caption(int(s), int(e), seed) for s, e in zip(images, epochs, strict=True)])
        )

    def used(self, samples: int, seed: int) -> Rows:
        """Return all images and texts that the first `samples` of the sequence may show, and the held-back ones, sorted."""
        images, texts = self.train.images, self.train.texts
        if samples < self.size:
            places = np.arange(samples)
            images, texts = shuffled(images, places, seed), shuffled(texts, places, seed if self.paired else seed + 1)
        if self.paired and len(texts):
            texts = np.concatenate([self.captions[self.offsets[i] : self.offsets[i + 1]] for i in texts])
        return Rows(np.union1d(images, self.held.images), np.union1d(texts, self.held.texts))

    def _caption(self, sample: int, epoch: int, seed: int) -> int:
        own = self.captions[self.offsets[sample] : self.offsets[sample + 1]]
        return int(own[0] if len(own) == 1 else own[random_for(seed, epoch, sample).integers(len(own))])


def read_corpus(data: Dataset, pairing: Literal["auto", "paired", "unpaired"], seed: int) -> Corpus:
    """Read texts (not pictures) of `data` once. Raises UsageError when it is empty, or not paired where that is asked for."""
    hashes, counts, pictured = array("q"), array("q"), array("b")
    for sample in data:
        hashes.extend(
            int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), signed=True) for t in sample.texts
        )
        counts.append(len(sample.texts))
        pictured.append(sample.picture is not None)
    offsets = np.concatenate(([0], np.cumsum(np.array(counts, dtype=np.int64))))
    _, first, captions = np.unique(np.array(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    owners = np.searchsorted(offsets, first, side="right") - 1
    origin = np.stack((owners, first - offsets[owners]), axis=1)
    images, texts = np.flatnonzero(np.array(pictured)), np.arange(len(first))
    complete = len(counts) > 0 and min(counts) > 0 and len(images) == len(counts)
    if not len(images) and not len(texts):
        raise UsageError("the data has no images and no texts to distill on", hint="give --data FOLDER with images")
    if pairing == "paired" and not complete:
        lacking = len(counts) - int(((np.array(counts) > 0) & (np.array(pictured) > 0)).sum())
        raise UsageError(
            f"{lacking} of {len(counts)} samples lack an image or a text, but distill.pairing is 'paired'",
            hint="use pairing: auto, or complete the data",
        )
    paired = complete and pairing != "unpaired"
    images, held_images = split(images, seed)
    if paired:
        texts, held_texts = images, captions[offsets[held_images]]
    else:
        texts, held_texts = split(texts, seed)
    return Corpus(data, paired, Rows(images, texts), Rows(held_images, held_texts), captions, offsets, origin)


def split(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (to train on, to measure on): a tenth is held back, 64 at most; below 10 rows all serve for both."""
    if len(rows) < 10:
        return rows, rows
    order = np.random.default_rng((seed, 0)).permutation(len(rows))
    held = min(HELD_BACK, len(rows) // 10)
    return np.sort(rows[order[held:]]), np.sort(rows[order[:held]])


def shuffled(rows: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
    """Return what stands at `places` of the endless sequence of epochs, each a permutation of `rows`."""
    if not len(rows):
        return rows
    epochs = places // len(rows)
    parts = [permutation(len(rows), seed, int(e))[places[epochs == e] % len(rows)] for e in np.unique(epochs)]
    return rows[np.concatenate(parts)] if parts else rows[:0]


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch."""
    return np.random.default_rng((seed, 1, epoch)).permutation(count)


def random_for(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the source of everything random about one sample in one epoch."""
    return np.random.default_rng((seed, 2, epoch, int(sample)))


def augmented(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return a light variation: a crop of 70 to 100% of the area, brightness, contrast and colour changed by up to 20%.

    Nothing is mirrored: that would turn "left" into "right" and make writing unreadable.
    """
    area, ratio = random.uniform(0.7, 1.0), np.exp(random.uniform(np.log(0.8), np.log(1.25)))
    width = min(image.width, max(1, round(image.width * np.sqrt(area * ratio))))
    height = min(image.height, max(1, round(image.height * np.sqrt(area / ratio))))
    left, top = (int(random.integers(room + 1)) for room in (image.width - width, image.height - height))
    view = (
        image.convert("RGB").crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)
    )
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = change(view).enhance(random.uniform(0.8, 1.2))
    return view


def ahead(batch: Callable[[int], T], first: int, last: int) -> Iterator[T]:
    """Yield `batch` of each step from `first` to `last`, without the last; the next is made in a thread meanwhile."""
    with ThreadPoolExecutor(1, "distill-data") as thread:
        coming = thread.submit(batch, first) if first < last else None
        for step in range(first, last):
            assert coming is not None
            ready, coming = coming, thread.submit(batch, step + 1) if step + 1 < last else None
            yield ready.result()


@dataclass(frozen=True)
class Micro:
    """What goes through the towers at once: the inputs of the student's trained towers, and of a live teacher."""

    inputs: dict[str, dict[str, Tensor]]
    live: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Feeder:
    """Prepares batches, one ahead in a thread, so that decoding and resizing overlap with computing."""

    corpus: Corpus
    student: Bundle
    towers: tuple[str, ...]
    """The towers that train."""
    batch_size: int
    """Samples in one pass through the towers."""
    accumulate: int
    seed: int
    rank: int = 0
    world: int = 1
    augment: bool = False
    live: Bundle | None = None
    """The teacher, where it must see the same changed images."""

    @property
    def samples(self) -> int:
        """Samples of one step, over all processes."""
        return self.batch_size * self.accumulate * self.world

    def batch(self, step: int) -> tuple[Rows, list[Micro]]:
        """Return the rows of step `step` over all processes, and this process's share of them, prepared."""
        start = step * self.samples
        first = self.rank * self.batch_size * self.accumulate
        places = range(first, first + self.batch_size * self.accumulate, self.batch_size)
        rows = self.corpus.batch(start, self.samples, self.seed)
        return rows, [self._micro(rows, start, slice(at, at + self.batch_size)) for at in places]

    def batches(self, first: int, last: int) -> Iterator[tuple[Rows, list[Micro]]]:
        """Yield the batches of steps `first` to `last`, without the last."""
        return ahead(self.batch, first, last)

    def _micro(self, rows: Rows, start: int, part: slice) -> Micro:
        inputs, live = {}, None
        if "vision" in self.towers:
            images = [self._image(int(row), start + part.start + i) for i, row in enumerate(rows.images[part])]
            inputs["vision"] = self.student.prepare("vision", images)
            live = self.live.prepare("vision", images) if self.live else None
        for name in self.towers:
            if name != "vision":
                inputs[name] = self.student.prepare(name, [self.corpus.text(int(row)) for row in rows.texts[part]])
        return Micro(inputs, live)

    def _image(self, row: int, place: int) -> Image.Image:
        image = self.corpus.image(row)
        if not self.augment:
            return image
        return augmented(image, random_for(self.seed, place // len(self.corpus.train.images), row))
