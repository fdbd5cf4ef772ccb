"""Controls that must not score: the same model on samples with nothing in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmcompress.data import Dataset, Sample, Waveform
from mmcompress.evaluate import metrics
from mmcompress.evaluate.answers import RATE, Answering, Model, answer
from mmcompress.evaluate.embed import Embedder, embed_samples
from mmcompress.evaluate.scene import Scene
from mmcompress.ops.statistics import Estimate, proportion

CONTROL_SAMPLES = 32
BLIND = "text only: always the commonest answer"
BLANK = "blank image"
SHUFFLED = "another sample's picture"
SILENCE = "silence"
HALLUCINATED = "answered"
"""Of silence: the share of recordings that are answered with words. Higher is worse."""


@dataclass(frozen=True)
class Control:
    """What the data gives away without looking at what the model should look at."""

    name: str
    task: str
    metric: str
    estimate: Estimate
    chance: float | None
    """Where known: what it may score at most, beyond noise."""
    lost: Estimate | None = None
    """What the same samples score as they are, above this; paired. Only where an answer is judged."""

    @property
    def leaks(self) -> bool:
        """Whether a control that must be at chance is above it by more than its interval."""
        return self.chance is not None and self.estimate.low > self.chance

    def to_json(self) -> dict[str, Any]:
        return {
            "control": self.name, "task": self.task, "metric": self.metric,
            **self.estimate.to_json(), "chance": self.chance, "leaks": self.leaks,
            **({"lost": self.lost.to_json()} if self.lost else {}),
        }  # fmt: skip


def controls(model: Model, dataset: Dataset, scene: Scene, tasks: list[str], seed: int, batch: int) -> list[Control]:
    """Return what `model` makes of blank pictures and of silence."""
    found: list[Control] = []
    if isinstance(model, Embedder) and scene.embedded is not None:
        found += _blank(model, dataset, scene, tasks, seed, batch)
    if isinstance(model, Answering) and "transcription" in tasks:
        found += _silence(model, dataset, scene, seed, batch)
    return found


def _blank(
    embedder: Embedder, dataset: Dataset, scene: Scene, tasks: list[str], seed: int, batch: int
) -> list[Control]:
    """What blank pictures score, and what the commonest answer scores without any picture.

    White pictures of the first samples' sizes, or silence as long as they last, take the samples' place; whatever they hit
    beyond chance comes from elsewhere than the picture.
    """
    samples, media = list(dataset.take(CONTROL_SAMPLES)), scene.embeddings.media
    empty = [_silent(sample) if media == "audio" else _page(sample) for sample in samples]
    # Not all at once: an engine may have been built for fewer.
    portions = [empty[start : start + batch] for start in range(0, len(empty), batch)]
    blank = np.concatenate([embed_samples(embedder, portion) for portion in portions])
    found = []
    for task in tasks:
        if task == "retrieval":
            pairs, gallery, metric = scene.embeddings.pairs, scene.embeddings.text_vectors, f"{media}_to_text_r1"
        elif task == "zero-shot" and scene.class_index is not None and scene.class_vectors is not None:
            pairs, gallery, metric = metrics.labels_as_pairs(scene.class_index), scene.class_vectors, "top1"
        else:
            continue
        commonest = metrics.commonest(pairs, len(scene.keys))
        seen = pairs[pairs[:, 0] < len(samples)]
        hits = metrics.within(metrics.ranks(blank, gallery, seen), 1)
        # All blank pictures get the same answer, so the bar is what the best single answer scores on these samples.
        bar = float(metrics.commonest(seen, len(samples)).mean())
        nothing = SILENCE if media == "audio" else BLANK
        found.append(Control(nothing, task, metric, proportion(hits, seed=seed), bar))
        found.append(Control(BLIND, task, metric, proportion(commonest, seed), None))
    return found


def _page(sample: Sample) -> Sample:
    return Sample(sample.key, picture=Image.new("RGB", sample.image.size, "white"))


def _silent(sample: Sample) -> Sample:
    return Sample(sample.key, audio=Waveform(np.zeros(len(sample.waveform(RATE)), dtype=np.float32), RATE))


def _silence(model: Answering, dataset: Dataset, scene: Scene, seed: int, batch: int) -> list[Control]:
    """How often digital silence, as long as the first samples' recordings, is answered with words: what is hallucinated."""
    silent = [_silent(sample) for sample in dataset.take(CONTROL_SAMPLES)]
    said: list[str] = []
    for start in range(0, len(silent), batch):
        said += answer(model, silent[start : start + batch])
    spoken = np.array([bool(scene.answers.wording.words(text)) for text in said])
    return [Control(SILENCE, "transcription", HALLUCINATED, proportion(spoken, seed=seed), None)]
