"""From a dataset to embeddings, batch by batch: what every task of a dual encoder starts from.

What texts describe is pictures, or recordings where the model says so (`Describing`); both are called images below.

Shape alphabet: B batch, N images, M distinct texts, P image-text pairs, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmcompress.data import Dataset, Sample, batches
from mmcompress.progress import Progress, Silent, track

Floats = NDArray[np.float32]
Media = Literal["image", "audio"]


@runtime_checkable
class Embedder(Protocol):
    """Whatever maps pictures and texts into one space: a model, or an exported artifact in a runtime."""

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return (B, C), not normalised."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return (B, C), not normalised."""


@runtime_checkable
class Describing(Protocol):
    """An embedder that says what its texts describe."""

    @property
    def describes(self) -> Media:
        """Pictures, or recordings."""

    def embed_samples(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return (B, C) of the samples' pictures or recordings, not normalised."""


@runtime_checkable
class CutsTexts(Protocol):
    """An embedder that knows which texts it cannot take whole."""

    def cut_texts(self, texts: Sequence[str]) -> tuple[int, int]:
        """Return how many texts are longer than the model takes, and that limit in tokens."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings of a dataset, and which text belongs to which image. Equal texts are one text."""

    keys: tuple[str, ...]
    """The N samples, in order."""
    images: Floats
    """(N, C), not normalised."""
    texts: tuple[str, ...]
    """The M distinct texts, in order of first appearance; none where texts were not asked for."""
    text_vectors: Floats
    """(M, C), not normalised."""
    pairs: NDArray[np.int64]
    """(P, 2): image index, text index; each pair once, in order of the images."""
    media: Media = "image"
    """What an image is: a picture, or a recording."""

    @property
    def text_owners(self) -> NDArray[np.int64]:
        """Return (M,): for each text the first image it belongs to."""
        owners = np.full(len(self.texts), -1, dtype=np.int64)
        owners[self.pairs[::-1, 1]] = self.pairs[::-1, 0]
        return owners


def describes(embedder: Embedder) -> Media:
    """Return what the texts of `embedder` describe."""
    return embedder.describes if isinstance(embedder, Describing) else "image"


def embed_samples(embedder: Embedder, samples: Sequence[Sample]) -> np.ndarray:
    """Return (B, C) of what the texts of `embedder` describe. Raises UsageError for samples that lack it."""
    if isinstance(embedder, Describing):
        return embedder.embed_samples(samples)
    return embedder.embed_images([sample.image for sample in samples])


def embed_dataset(
    embedder: Embedder, dataset: Dataset, batch: int = 32, progress: Progress | None = None, with_texts: bool = True
) -> Embeddings:
    """Embed every image and every distinct text of `dataset`; at most `batch` pictures or recordings are decoded at a time.

    Raises UsageError for samples whose image cannot be read, ValueError when the embedder returns something else than (B, C).
    """
    progress = progress or Silent()
    keys: list[str] = []
    numbers: dict[str, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    images: Floats | None = None
    total = -(-len(dataset) // batch)
    media = describes(embedder)
    label = "embedding recordings" if media == "audio" else "embedding images"
    for samples in track(batches(dataset, batch), progress, label, total):
        vectors = _checked(embed_samples(embedder, samples), len(samples))
        if images is None:
            images = np.empty((len(dataset), vectors.shape[1]), dtype=np.float32)
        images[len(keys) : len(keys) + len(samples)] = vectors
        for sample in samples:
            for text in sample.texts if with_texts else ():
                pairs[len(keys), numbers.setdefault(text, len(numbers))] = None
            keys.append(sample.key)
    if images is None:
        raise ValueError("an empty dataset has no embeddings")
    texts = tuple(numbers)
    vectors = embed_texts(embedder, texts, batch, progress) if texts else np.empty((0, images.shape[1]), np.float32)
    if vectors.shape[1] != images.shape[1]:
        raise ValueError(f"images are embedded in {images.shape[1]} channels but texts in {vectors.shape[1]}")
    return Embeddings(tuple(keys), images, texts, vectors, np.array(list(pairs), dtype=np.int64).reshape(-1, 2), media)


def embed_texts(embedder: Embedder, texts: Sequence[str], batch: int = 32, progress: Progress | None = None) -> Floats:
    """Return (len(texts), C). Texts of like length share a batch, so that little is spent on padding."""
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
    vectors: Floats | None = None
    portions = _portions(order, batch)
    for rows in track(portions, progress or Silent(), "embedding texts", -(-len(order) // batch)):
        found = _checked(embedder.embed_texts([texts[row] for row in rows]), len(rows))
        if vectors is None:
            vectors = np.empty((len(texts), found.shape[1]), dtype=np.float32)
        vectors[rows] = found
    if vectors is None:
        raise ValueError("no texts to embed")
    return vectors


def _portions(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _checked(vectors: np.ndarray, count: int) -> Floats:
    found = np.asarray(vectors, dtype=np.float32)
    if found.ndim != 2 or len(found) != count:
        raise ValueError(f"the embedder returned shape {found.shape} for {count} items, expected ({count}, C)")
    return found
