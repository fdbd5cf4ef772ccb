"""Retrieval, zero-shot and agreement as per-sample values, in numpy.

Every function returns one value a sample rather than a mean, so that results can be bootstrapped and paired. Ties count
against the model: a constant embedder ranks everything last instead of first, and so do NaN embeddings. Recall follows
the usual image-text protocol (Karpathy and Fei-Fei 2015, section 4.1): the best ranked of several positives counts.
Zero-shot follows CLIP (Radford et al. 2021, section 3.1.4): prompts are averaged in embedding space. Deliberate
difference: equal texts are one entry of the gallery, so an image with a common caption is not wrong by naming its twin.

Shape alphabet: Q queries, G gallery entries, C channels, P positive pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

# Cosines of float32 vectors carry errors of about 1e-7, so equal vectors may differ by that much in a matrix product.
TIE = 1e-6
# Similarities held at once (64 MB); the whole matrix never is.
CELLS = 2**24


def normalise(vectors: np.ndarray) -> Floats:
    """Return (n, C) with rows of length 1; a zero row stays zero, a row with NaN or infinity becomes NaN."""
    wide = np.asarray(vectors, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.linalg.norm(wide, axis=1, keepdims=True)
        return (wide / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def ranks(queries: np.ndarray, gallery: np.ndarray, positives: np.ndarray) -> Integers:
    """Return (Q,): the rank, from 1, of each query's best positive among all negatives.

    `queries` (Q, C) and `gallery` (G, C) need not be normalised; `positives` (P, 2) holds (query, gallery) indices. A
    negative that ties with the positive, or is NaN, ranks before it. Raises ValueError when a query has no positive.
    """
    counts = np.bincount(positives[:, 0], minlength=len(queries)) if len(positives) else np.zeros(len(queries))
    if len(counts) and counts.min() == 0:
        raise ValueError(f"query {int(counts.argmin())} has no positive")
    found = np.empty(len(queries), dtype=np.int64)
    for rows, similarity in _similarities(queries, gallery):
        inside = positives[(positives[:, 0] >= rows.start) & (positives[:, 0] < rows.stop)]
        positive = np.zeros(similarity.shape, dtype=bool)
        positive[inside[:, 0] - rows.start, inside[:, 1]] = True
        best = np.where(positive, similarity, -np.inf).max(axis=1, keepdims=True)
        ahead = ~(similarity < best - TIE) & ~positive
        found[rows.start : rows.stop] = 1 + ahead.sum(axis=1)
    return found


def within(found_ranks: Integers, k: int) -> Floats:
    """Return (Q,): 1 where the rank is at most `k`, else 0."""
    return (found_ranks <= k).astype(np.float32)


def chance(positives: np.ndarray, queries: int, gallery: int, k: int) -> float:
    """Return the expected share of hits within `k` of a random ranking: the mean of 1 - C(G - p, k) / C(G, k)."""
    counts, times = np.unique(np.bincount(positives[:, 0], minlength=queries), return_counts=True)
    missed = [math.comb(gallery - int(count), k) / math.comb(gallery, k) for count in counts]
    return float(np.average([1 - share for share in missed], weights=times))


def class_vectors(prompts: np.ndarray, classes: int) -> Floats:
    """Return (K, C): for each class the direction of the mean of its prompts' directions.

    `prompts` (K * T, C) holds T prompts a class, class by class.
    """
    directions = normalise(prompts)
    return normalise(directions.reshape(classes, -1, directions.shape[1]).mean(axis=1))


def cosines(first: np.ndarray, second: np.ndarray) -> Floats:
    """Return (n,): the cosine between row i of both (n, C); 0 for a zero row, NaN for a row that is not finite."""
    found = (normalise(first) * normalise(second)).sum(axis=1)
    return np.clip(found, -1, 1)


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> Integers:
    """Return (Q, k): the gallery indices most similar to each query, best first; of equal ones the lower index first."""
    found = np.empty((len(queries), k), dtype=np.int64)
    for rows, similarity in _similarities(queries, gallery):
        distance = np.where(np.isnan(similarity), np.inf, -similarity)
        few = np.sort(np.argpartition(distance, k - 1, axis=1)[:, :k], axis=1)
        order = np.argsort(np.take_along_axis(distance, few, axis=1), axis=1, kind="stable")
        found[rows.start : rows.stop] = np.take_along_axis(few, order, axis=1)
    return found


def overlap(first: Integers, second: Integers) -> Floats:
    """Return (Q,): the share of indices that row i of both (Q, k) have in common, whatever their order."""
    common = (first[:, :, None] == second[:, None, :]).any(axis=2).sum(axis=1)
    return (common / first.shape[1]).astype(np.float32)


def commonest(positives: np.ndarray, queries: int) -> Floats:
    """Return (Q,): hits of the best answer that ignores the query, which is the gallery entry most queries accept."""
    favourite = np.bincount(positives[:, 1]).argmax()
    hits = np.zeros(queries, dtype=np.float32)
    hits[positives[positives[:, 1] == favourite, 0]] = 1
    return hits


def labels_as_pairs(labels: Sequence[int] | Integers) -> Integers:
    """Return (Q, 2) positive pairs where query i has the one positive labels[i]."""
    return np.stack([np.arange(len(labels)), np.asarray(labels, dtype=np.int64)], axis=1)


def _similarities(queries: np.ndarray, gallery: np.ndarray) -> Iterator[tuple[range, Floats]]:
    """Yield cosines (q, G) for a few queries at a time."""
    left, right = normalise(queries), normalise(gallery).T
    step = max(1, CELLS // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        rows = range(start, min(start + step, len(queries)))
        with np.errstate(invalid="ignore"):
            yield rows, left[rows.start : rows.stop] @ right
