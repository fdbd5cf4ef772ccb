"""What both training programs share: drawings in memory, augmentation, an exponential average."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

# A mirrored "left arrow" is a right arrow, a mirrored letter is no letter: such captions are never flipped.
HANDED = re.compile(
    r"\b(left|right|clockwise|counterclockwise|button|keycap|sign|mark|o’clock|thirty|square|letters?|input|new|of)\b"
)


@dataclass(frozen=True)
class Drawings:
    """All drawings of some vendors in memory.

    pixels: (B, 3, S, S) uint8; concept: (B,) index into `captions`; flippable: (B,) bool; vendor: one name per drawing.
    captions, tags: one entry per concept.
    """

    pixels: Tensor
    concept: Tensor
    flippable: Tensor
    vendor: list[str]
    captions: list[str]
    tags: list[list[str]]

    def __len__(self) -> int:
        return len(self.vendor)

    def only(self, keep: Tensor) -> "Drawings":
        """The drawings where `keep` (B,) is true; the list of concepts stays as it is."""
        names = [name for name, kept in zip(self.vendor, keep.tolist(), strict=True) if kept]
        return Drawings(self.pixels[keep], self.concept[keep], self.flippable[keep], names, self.captions, self.tags)


def load_drawings(folder: Path, captions: Sequence[str] | None = None) -> Drawings:
    """Reads `<folder>/<vendor>/metadata.jsonl` and the PNG files named there.

    With `captions` given, concepts are numbered in that order (and must all be in it); otherwise in order of first appearance.
    """
    numbers = {text: i for i, text in enumerate(captions or ())}
    tags: dict[int, list[str]] = {}
    pixels, concept, vendors = [], [], []
    for table in sorted(folder.glob("*/metadata.jsonl")):
        for line in table.read_text(encoding="utf-8").splitlines():
            row: dict[str, Any] = json.loads(line)
            number = numbers[row["text"]] if captions is not None else numbers.setdefault(row["text"], len(numbers))
            tags.setdefault(number, row["tags"])
            with Image.open(table.parent / row["file_name"]) as image:
                pixels.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
            concept.append(number)
            vendors.append(table.parent.name)
    texts = sorted(numbers, key=numbers.__getitem__)
    flippable = torch.tensor([HANDED.search(texts[number].lower()) is None for number in concept])
    return Drawings(
        torch.stack(pixels),
        torch.tensor(concept),
        flippable,
        vendors,
        texts,
        [tags.get(number, []) for number in range(len(texts))],
    )


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, S, S) uint8 -> float, scaled to 0..1 and standardised per channel."""
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels.float() / 255 - shift) / scale


def augmented(pixels: Tensor, flippable: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, rotate, mirror, recolour: (B, 3, S, S) uint8 -> the same, on white paper.

    Hue moves little, for "red apple" must stay red; one drawing in eight loses its colour, as one vendor draws without any.
    """
    batch = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    angle, zoom = uniform(-0.22, 0.22), uniform(0.88, 1.25)
    flip = torch.where((uniform(0, 1) < 0.5) & flippable, -1.0, 1.0)
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [
        torch.stack((cosine * flip, -sine, uniform(-0.1, 0.1)), 1),
        torch.stack((sine * flip, cosine, uniform(-0.1, 0.1)), 1),
    ]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    ink = 1 - pixels.float() / 255  # zero padding of the ink is white paper
    image = 1 - nn.functional.grid_sample(ink, grid, align_corners=False)
    grey = image.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1) < 0.125, torch.zeros(batch), uniform(0.6, 1.5)).view(-1, 1, 1, 1)
    image = grey + (image - grey) * saturation
    contrast, brightness = uniform(0.75, 1.2).view(-1, 1, 1, 1), uniform(-0.08, 0.08).view(-1, 1, 1, 1)
    tint = (torch.rand(batch, 3, 1, 1, generator=generator) - 0.5) * 0.1
    image = 1 - (1 - image) * (contrast + tint) - brightness
    return image.clamp(0, 1).mul(255).to(torch.uint8)


class Average:
    """Exponential moving average of parameters; its values generalise better than the last step's."""

    def __init__(self, parameters: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in parameters.items()}
        self.steps = 0

    def update(self, parameters: dict[str, Tensor]) -> None:
        """Takes in the current values; early on the average is short, so that it does not remember the initialisation."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach(), 1 - decay)
