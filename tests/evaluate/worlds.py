"""A small world of pictures and words whose embeddings are known, and embedders that see it well, badly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mmcompress.data import Dataset, Memory, Sample, ZeroShot

CHANNELS = 32


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (number // 256, number % 256, 7))


def number_of(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    return int(red) * 256 + int(green) if blue == 7 else -1  # -1: not one of ours, such as a blank one


def world(n: int, captions: Callable[[int], tuple[str, ...]] | None = None, classes: int = 4) -> Dataset:
    """Return `n` samples; sample i has caption "thing i", class "kind i%classes" and group "half 0" or "half 1"."""
    samples = [
        Sample(
            f"k{i:04d}",
            captions(i) if captions else (f"thing {i}",),
            label=f"kind {i % classes}",
            group=f"half {int(i < n // 2)}",
            tags=("even",) if i % 2 == 0 else (),
            picture=picture(i),
        )
        for i in range(n)
    ]
    labels = tuple(f"kind {k}" for k in range(classes))
    return Dataset(Memory(samples), "world", ZeroShot(labels, labels, ("a {}", "the {}")))


def direction(*seed: int) -> np.ndarray:
    return np.random.default_rng(list(seed)).normal(size=CHANNELS)


class Seeing:
    """Sees thing i and its kind, through noise; `blind` lists the numbers it cannot see at all."""

    def __init__(self, noise: float = 0.0, seed: int = 0, classes: int = 4, blind: Sequence[int] = ()) -> None:
        self.noise, self.seed, self.classes, self.blind = noise, seed, classes, set(blind)
        self.largest_batch = 0

    def meaning(self, number: int) -> np.ndarray:
        return direction(1, number) + 0.8 * direction(2, number % self.classes)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.largest_batch = max(self.largest_batch, len(images))
        found = []
        for image in images:
            number = number_of(image)
            if number < 0 or number in self.blind:
                found.append(direction(3))
            else:
                found.append(self.meaning(number) + self.noise * direction(4, self.seed, number))
        return np.array(found)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.largest_batch = max(self.largest_batch, len(texts))
        return np.array([self._text(*text.split()[-2:]) for text in texts])

    def _text(self, noun: str, number: str) -> np.ndarray:
        return self.meaning(int(number)) if noun == "thing" else direction(2, int(number))


class Guessing:
    """Returns noise that has nothing to do with what it is shown."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self.rng.normal(size=(len(images), CHANNELS))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.rng.normal(size=(len(texts), CHANNELS))


class Constant:
    """Returns the same value whatever it is shown."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return np.full((len(images), CHANNELS), self.value)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.full((len(texts), CHANNELS), self.value)
