"""Averages hide damage: the same metrics over parts of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcompress.data import Dataset
from mmcompress.evaluate.answers import RATE
from mmcompress.evaluate.embed import Embeddings
from mmcompress.evaluate.scene import Measured, Results, Scene
from mmcompress.evaluate.tasks import TASKS
from mmcompress.ops.statistics import Estimate

Mask = NDArray[np.bool_]

# Below this the interval of a share is wider than +-20 points and says nothing.
SMALLEST = 20
MOST_A_FIELD = 12


@dataclass(frozen=True)
class Part:
    """Which samples belong to a slice."""

    name: str
    samples: Mask
    """(N,)"""
    texts: Mask | None = None
    """(M,), where it is a slice of the texts too."""

    def of(self, measured: Measured) -> Mask:
        """Return the mask for a metric's samples; nothing of a metric it says nothing of."""
        if measured.unit != "text":
            return self.samples
        return self.texts if self.texts is not None else np.zeros(len(measured.values), dtype=bool)


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


def parts(dataset: Dataset, scene: Scene) -> list[Part]:
    """Return the slices this data has: its groups, labels and tags of 20 samples or more, its longer texts, the shorter and the
    longer of its recordings, transcripts and prompts, and what was asked after other questions."""
    fields: dict[str, list[tuple[str, ...]]] = {"group": [], "label": [], "tag": []}
    seconds: list[float] = []
    prompts: list[int] = []
    turns: list[int] = []
    for sample in dataset:
        fields["group"].append((sample.group,) if sample.group else ())
        fields["label"].append((sample.label,) if sample.label else ())
        fields["tag"].append(sample.tags)
        if scene.answered is not None and sample.audio is not None:
            seconds.append(len(sample.waveform(RATE)) / RATE)
        if sample.question:
            turns.append(len(sample.turns))
            prompts.append(sum(len(text.split()) for turn in (*sample.turns, (sample.question,)) for text in turn))
    embedded, answered = scene.embedded, scene.answered
    found = []
    for field, values in fields.items():
        counts = Counter(value for several in values for value in set(several))
        frequent = [(value, count) for value, count in counts.most_common() if SMALLEST <= count < len(values)]
        for value, _ in sorted(frequent, key=lambda item: (-item[1], item[0]))[:MOST_A_FIELD]:
            samples = np.array([value in several for several in values])
            found.append(Part(f"{field}={value}", samples, samples[embedded.text_owners] if embedded else None))
    if embedded is not None:
        found += _longer_texts(embedded)
    if answered is not None:
        found += _halves("recording", "s", seconds) if len(seconds) == len(scene.keys) else ()
        if len(prompts) == len(scene.keys):
            found += _halves("prompt", "words", prompts)
            found += _later_turns(np.array(turns))
        else:
            found += _halves("transcript", "words", [len(words) for words in answered.reference_words])
    return found


def measure_slices(results: Results, reference: Results, all_parts: list[Part], seed: int) -> list[Slice]:
    """Return every headline metric over every part that has 20 samples of it."""
    found = []
    for task, by_metric in results.items():
        earlier = reference.get(task, {}) if not TASKS[task].relative else {}
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


def _longer_texts(embeddings: Embeddings) -> Iterator[Part]:
    if not embeddings.texts:
        return
    lengths = np.array([len(text) for text in embeddings.texts])
    median = int(np.median(lengths))
    longer = lengths > median
    images = np.zeros(len(embeddings.keys), dtype=bool)
    images[embeddings.pairs[longer[embeddings.pairs[:, 1]], 0]] = True
    yield Part(f"text longer than {median} characters", images, longer)


def _halves(what: str, unit: str, lengths: Sequence[float]) -> Iterator[Part]:
    """The samples that are longer than the median, and the others: compression may cost the long ones their end."""
    if not lengths:
        return
    median = float(np.median(lengths))
    longer = np.array(lengths) > median
    if longer.any():
        yield Part(f"{what} longer than {median:.3g} {unit}", longer)
        yield Part(f"{what} up to {median:.3g} {unit}", ~longer)


def _later_turns(turns: NDArray[np.int64]) -> Iterator[Part]:
    """Questions asked after others about the same picture, and those asked first."""
    if turns.any() and not turns.all():
        yield Part("multi-turn", turns > 0)
        yield Part("first turn", turns == 0)
