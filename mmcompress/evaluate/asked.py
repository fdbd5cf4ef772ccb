"""What an evaluation will do, settled from the metadata alone, before an hour of embedding: tasks, texts and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcompress.data import Dataset, Sample, ZeroShot, zero_shot_classes
from mmcompress.errors import UsageError, closest
from mmcompress.evaluate.tasks import TASKS


@dataclass(frozen=True, eq=False)
class Asked:
    """The tasks, and what they need of the data."""

    tasks: list[str]
    keys: tuple[str, ...]
    with_texts: bool
    zero_shot: ZeroShot | None
    class_index: NDArray[np.int64] | None

    def config(self) -> dict[str, Any]:
        """Return the part of an evaluation's configuration that this settles."""
        found: dict[str, Any] = {"tasks": self.tasks, "samples": len(self.keys)}
        if self.zero_shot:
            found |= {"classes": len(self.zero_shot.labels), "templates": list(self.zero_shot.templates)}
        return found


def ask(dataset: Dataset, tasks: Sequence[str] | None, has_reference: bool) -> Asked:
    """Return what to do for `tasks`, by default every task the data allows.

    Raises UsageError for an unknown task and for data that lacks what a task needs.
    """
    for name in tasks or ():
        if name not in TASKS:
            raise UsageError(f"there is no task '{name}'", hint=closest(name, TASKS))
    samples = list(dataset)  # metadata only; pictures are not decoded
    with_texts = all(sample.texts for sample in samples)
    chosen = list(dict.fromkeys(tasks)) if tasks else _possible(dataset, samples, with_texts, has_reference)
    if not chosen:
        raise UsageError(
            f"{dataset.name} has neither texts nor labels for every sample, so no task can run",
            hint="add a text or a label to every sample",
        )
    if "agreement" in chosen and not has_reference:
        raise UsageError("agreement needs a reference to agree with", hint="evaluate the original too")
    if "retrieval" in chosen and not with_texts:
        missing = next(sample.key for sample in samples if not sample.texts)
        raise UsageError(f"sample '{missing}' has no text", hint="retrieval needs a text for every sample")
    zero_shot = (dataset.zero_shot or zero_shot_classes(samples)) if "zero-shot" in chosen else None
    index = np.array([zero_shot.index(sample) for sample in samples], dtype=np.int64) if zero_shot else None
    return Asked(
        chosen,
        tuple(sample.key for sample in samples),
        with_texts and ("retrieval" in chosen or "agreement" in chosen),
        zero_shot,
        index,
    )


def _possible(dataset: Dataset, samples: list[Sample], with_texts: bool, has_reference: bool) -> list[str]:
    labels = {sample.label for sample in samples}
    labelled = dataset.zero_shot is not None or (None not in labels and len(labels) > 1)
    several = len({text for sample in samples for text in sample.texts}) > 1 and len(samples) > 1
    allowed = {"retrieval": with_texts and several, "zero-shot": labelled, "agreement": has_reference}
    return [name for name, possible in allowed.items() if possible]
