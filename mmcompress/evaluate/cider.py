"""CIDEr-D: how much a caption says what people say of this picture and not of every picture.

Vedantam et al. 2015, section 4, with the changes of CIDEr-D (its section 6), as the COCO caption evaluation computes it. A caption
is for each n = 1..4 a vector of weights, one for each of its n-grams:

    g_n[w] = count(w) * log(N / max(1, pictures that have w in a reference))
    CIDEr-D_n(c, r) = exp(-(|c| - |r|)^2 / (2 * 6^2)) * sum_w min(g_c[w], g_r[w]) * g_r[w] / (|g_c| |g_r|)
    CIDEr-D(c) = 10 * mean over n, over references r of CIDEr-D_n(c, r)

So it lies in 0..10; what tables print as 110 is 1.10 here. A reference of fewer than four words has no 4-grams: even itself scores
less than 10 against it. Deliberate differences: words are those of `Wording` (the published program uses the Penn Treebank
tokenizer), and |c| counts words, where that program counts bigrams: the same for every caption that is not empty.

Shape alphabet: N pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

LONGEST = 4
SIGMA = 6.0
Words = Sequence[str]
Grams = Counter[tuple[str, ...]]


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Return the CIDEr-D of each of N captions, each given as its words, with its own references.

    How rare an n-gram is counts over all these references, so scores depend on the whole data. Raises ValueError when a caption has
    no reference, or the numbers differ.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError("every caption needs a reference")
    described = [[_grams(words) for words in several] for several in references]
    pictures = Counter(gram for several in described for gram in set().union(*several))
    rarity = {gram: math.log(len(captions) / count) for gram, count in pictures.items()}
    unknown = math.log(len(captions))
    found = []
    for words, several, grams in zip(captions, references, described, strict=True):
        own = _weighted(_grams(words), rarity, unknown)
        scores = [
            _alike(own, _weighted(other, rarity, unknown)) * math.exp(-((len(words) - len(said)) ** 2) / (2 * SIGMA**2))
            for said, other in zip(several, grams, strict=True)
        ]
        found.append(10 * sum(scores) / len(scores))
    return found


def _grams(words: Words) -> Grams:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )


def _weighted(grams: Grams, rarity: dict[tuple[str, ...], float], unknown: float) -> list[dict[tuple[str, ...], float]]:
    """Return the vector of weights for each n."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * rarity.get(gram, unknown)
    return vectors


def _alike(own: list[dict[tuple[str, ...], float]], other: list[dict[tuple[str, ...], float]]) -> float:
    """Return the mean over n of the clipped cosine."""
    total = 0.0
    for mine, theirs in zip(own, other, strict=True):
        length = math.hypot(*mine.values()) * math.hypot(*theirs.values())
        if length:
            total += (
                sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs)
                / length
            )
    return total / LONGEST
