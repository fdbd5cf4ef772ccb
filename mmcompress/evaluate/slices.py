"""Averages hide damage: the same metrics over parts of the data, and controls that must not score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmcompress.data import Dataset
from mmcompress.evaluate import metrics
from mmcompress.evaluate.embed import Embedder, Embeddings
from mmcompress.evaluate.tasks import TASKS, Measured, Scene
from mmcompress.ops.statistics import Estimate, proportion

Results = dict[str, dict[str, Measured]]
Mask = NDArray[np.bool_]

# Below this the interval of a share is wider than +-20 points and says nothing.
SMALLEST = 20
MOST_A_FIELD = 12
CONTROL_IMAGES = 32
BLIND = "text only: always the commonest answer"


@dataclass(frozen=True)
class Part:
    """Which samples belong to a slice."""

    name: str
    images: Mask
    """(N,)"""
    texts: Mask
    """(M,)"""

    def of(self, measured: Measured) -> Mask:
        """Return the mask for a metric's samples."""
        return self.images if measured.unit == "image" else self.texts


@dataclass(frozen=True)
class Slice:
    """A headline metric over one part of the data."""

    part: str
    task: str
    metric: str
    estimate: Estimate
    difference: Estimate | None = None
    """Against the reference, on the same samples."""

    def to_json(self) -> dict[str, Any]:
        difference = {"difference": self.difference.to_json()} if self.difference else {}
        return {"slice": self.part, "task": self.task, "metric": self.metric, **self.estimate.to_json(), **difference}


@dataclass(frozen=True)
class Control:
    """What the data gives away without looking at what the model should look at."""

    name: str
    task: str
    metric: str
    estimate: Estimate
    chance: float | None
    """Where known: what it may score at most, beyond noise."""

    @property
    def leaks(self) -> bool:
        """Whether a control that must be at chance is above it by more than its interval."""
        return self.chance is not None and self.estimate.low > self.chance

    def to_json(self) -> dict[str, Any]:
        return {
            "control": self.name, "task": self.task, "metric": self.metric,
            **self.estimate.to_json(), "chance": self.chance, "leaks": self.leaks,
        }  # fmt: skip


def parts(dataset: Dataset, embeddings: Embeddings) -> list[Part]:
    """Return the slices this data has: its groups, labels and tags of 20 samples or more, and its longer texts."""
    fields: dict[str, list[tuple[str, ...]]] = {"group": [], "label": [], "tag": []}
    for sample in dataset:
        fields["group"].append((sample.group,) if sample.group else ())
        fields["label"].append((sample.label,) if sample.label else ())
        fields["tag"].append(sample.tags)
    found = []
    for field, values in fields.items():
        counts = Counter(value for several in values for value in set(several))
        frequent = [(value, count) for value, count in counts.most_common() if SMALLEST <= count < len(values)]
        for value, _ in sorted(frequent, key=lambda item: (-item[1], item[0]))[:MOST_A_FIELD]:
            images = np.array([value in several for several in values])
            found.append(Part(f"{field}={value}", images, images[embeddings.text_owners]))
    return found + list(_longer_texts(embeddings))


def measure_slices(results: Results, reference: Results, all_parts: list[Part], seed: int) -> list[Slice]:
    """Return every headline metric over every part that has 20 samples of it."""
    found = []
    for task, by_metric in results.items():
        earlier = reference.get(task, {}) if task != "agreement" else {}
        for metric in TASKS[task].headlines:
            if metric not in by_metric:
                continue
            measured, before = by_metric[metric], earlier.get(metric)
            for part in all_parts:
                chosen = part.of(measured)
                if chosen.sum() >= SMALLEST:
                    difference = measured.difference(before, seed, chosen) if before else None
                    found.append(Slice(part.name, task, metric, measured.estimate(seed, chosen), difference))
    return found


def controls(
    embedder: Embedder, dataset: Dataset, scene: Scene, tasks: list[str], seed: int, batch: int
) -> list[Control]:
    """Return what blank pictures score, and what the commonest answer scores without any picture.

    White pictures of the first samples' sizes take the place of the samples' own; whatever they hit beyond chance comes
    from elsewhere than the picture.
    """
    samples = list(dataset.take(CONTROL_IMAGES))
    pages = [Image.new("RGB", sample.image.size, "white") for sample in samples]
    # Not all at once: an engine may have been built for fewer.
    portions = [pages[start : start + batch] for start in range(0, len(pages), batch)]
    blank = np.concatenate([embedder.embed_images(portion) for portion in portions])
    found = []
    for task in tasks:
        if task == "retrieval":
            pairs, gallery, metric = scene.embeddings.pairs, scene.embeddings.text_vectors, "image_to_text_r1"
        elif task == "zero-shot" and scene.class_index is not None and scene.class_vectors is not None:
            pairs, gallery, metric = metrics.labels_as_pairs(scene.class_index), scene.class_vectors, "top1"
        else:
            continue
        commonest = metrics.commonest(pairs, len(scene.embeddings.keys))
        seen = pairs[pairs[:, 0] < len(samples)]
        hits = metrics.within(metrics.ranks(blank, gallery, seen), 1)
        # All blank pictures get the same answer, so the bar is what the best single answer scores on these samples.
        bar = float(metrics.commonest(seen, len(samples)).mean())
        found.append(Control("blank image", task, metric, proportion(hits, seed=seed), bar))
        found.append(Control(BLIND, task, metric, proportion(commonest, seed), None))
    return found


def _longer_texts(embeddings: Embeddings) -> Iterator[Part]:
    if not embeddings.texts:
        return
    lengths = np.array([len(text) for text in embeddings.texts])
    median = int(np.median(lengths))
    longer = lengths > median
    images = np.zeros(len(embeddings.keys), dtype=bool)
    images[embeddings.pairs[longer[embeddings.pairs[:, 1]], 0]] = True
    yield Part(f"text longer than {median} characters", images, longer)
