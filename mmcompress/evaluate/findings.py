"""What a person must be told, and the first check of all: are these embeddings at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmcompress.evaluate.metrics import normalise

Level = Literal["good", "note", "bad"]

# The mean cosine between different items. CLIP-like towers live in a narrow cone, but below 0.9.
COLLAPSED = 0.99


@dataclass(frozen=True)
class Finding:
    """One sentence of a verdict."""

    level: Level
    text: str

    def to_json(self) -> dict[str, str]:
        return {"level": self.level, "text": self.text}


def health(name: str, vectors: np.ndarray) -> list[Finding]:
    """Return what is wrong with `vectors` (n, C) as embeddings of `name`: not finite, zero, all alike. Empty: nothing."""
    found = []
    finite = np.isfinite(vectors).all(axis=1)
    zero = finite & (np.abs(vectors).max(axis=1, initial=0) == 0)
    n = len(vectors)
    if not finite.all():
        found.append(Finding("bad", f"BROKEN: {(~finite).sum()} of {n} {name} embeddings are NaN or infinite"))
    if zero.any():
        found.append(Finding("bad", f"BROKEN: {zero.sum()} of {n} {name} embeddings are zero"))
    usable = vectors[finite & ~zero]
    if len(usable) > 1:
        similarity = mean_cosine(usable)
        if similarity > COLLAPSED:
            found.append(
                Finding(
                    "bad", f"COLLAPSED: {name} embeddings are all alike, mean cosine {similarity:.4f}, n={len(usable)}"
                )
            )
    return found


def mean_cosine(vectors: np.ndarray) -> float:
    """Return the mean cosine between different rows of `vectors` (n, C), n > 1: (|sum of directions|^2 - n) / (n^2 - n)."""
    total = normalise(vectors).astype(np.float64).sum(axis=0)
    n = len(vectors)
    return float((total @ total - n) / (n * n - n))
