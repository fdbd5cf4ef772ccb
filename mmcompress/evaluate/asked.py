"""What an evaluation will do, settled from the metadata alone, before an hour of computing: tasks, texts and classes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcompress.data import Dataset, Sample, ZeroShot, zero_shot_classes
from mmcompress.errors import UsageError, closest
from mmcompress.evaluate.answers import Need
from mmcompress.evaluate.scene import Scene, has
from mmcompress.evaluate.tasks import TASKS
from mmcompress.evaluate.words import Wording

# Tasks that hold answers against the texts of the data, and what every sample needs for them.
JUDGED = {
    "transcription": "a recording with one text",
    "vqa": "a question with an accepted answer",
    "captioning": "a picture with a caption and no question",
}


@dataclass(frozen=True, eq=False)
class Asked:
    """The tasks, and what they need of the data."""

    tasks: list[str]
    keys: tuple[str, ...]
    with_texts: bool
    """Whether texts are embedded."""
    zero_shot: ZeroShot | None
    class_index: NDArray[np.int64] | None
    wording: Wording
    """How the words of answers are told apart."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the model must give."""
        return frozenset(TASKS[name].needs for name in self.tasks)

    @property
    def with_references(self) -> bool:
        """Whether answers are held against what the data says."""
        return any(name in JUDGED for name in self.tasks)

    def config(self) -> dict[str, Any]:
        """Return the part of an evaluation's configuration that this settles."""
        found: dict[str, Any] = {"tasks": self.tasks, "samples": len(self.keys)}
        if self.zero_shot:
            found |= {"classes": len(self.zero_shot.labels), "templates": list(self.zero_shot.templates)}
        if "answers" in self.needs:
            found["wording"] = self.wording.name
        return found


def ask(
    dataset: Dataset,
    tasks: Sequence[str] | None,
    gives: Collection[Need],
    wording: Wording,
    reference: Scene | None = None,
) -> Asked:
    """Return what to do for `tasks`, by default every task that the data allows and a model that `gives` so much can do.

    Raises UsageError for an unknown task, for one the model cannot do, and for data that lacks what a task needs.
    """
    for name in tasks or ():
        require_able(name, gives)
    samples = list(dataset)  # metadata only; neither pictures nor sound are decoded
    with_texts = all(sample.texts for sample in samples)
    chosen = list(dict.fromkeys(tasks)) if tasks else _possible(dataset, samples, gives, reference)
    if not chosen:
        raise _nothing(dataset, gives)
    if "retrieval" in chosen and not with_texts:
        missing = next(sample.key for sample in samples if not sample.texts)
        raise UsageError(f"sample '{missing}' has no text", hint="retrieval needs a text for every sample")
    for name in chosen:
        if TASKS[name].relative and not has(reference, TASKS[name].needs):
            raise UsageError(f"{name} needs a reference to agree with", hint="evaluate the original too")
    _require_answers(chosen, samples, wording)
    zero_shot = (dataset.zero_shot or zero_shot_classes(samples)) if "zero-shot" in chosen else None
    index = np.array([zero_shot.index(sample) for sample in samples], dtype=np.int64) if zero_shot else None
    return Asked(
        chosen,
        tuple(sample.key for sample in samples),
        with_texts and ("retrieval" in chosen or "agreement" in chosen),
        zero_shot,
        index,
        wording,
    )


def require_able(name: str, gives: Collection[Need]) -> None:
    """Raise UsageError when there is no task `name`, or when a model that `gives` so much cannot do it."""
    if name not in TASKS:
        raise UsageError(f"there is no task '{name}'", hint=closest(name, TASKS))
    needs = TASKS[name].needs
    if needs not in gives:
        others = [task.name for task in TASKS.values() if task.needs in gives]
        raise UsageError(
            f"{name} needs {needs}, and this model gives {' and '.join(sorted(gives)) or 'none'}",
            hint=f"its tasks are {', '.join(others)}" if others else "evaluate another model",
        )


def _possible(dataset: Dataset, samples: list[Sample], gives: Collection[Need], reference: Scene | None) -> list[str]:
    labels = {sample.label for sample in samples}
    labelled = dataset.zero_shot is not None or (None not in labels and len(labels) > 1)
    with_texts = all(sample.texts for sample in samples)
    several = len({text for sample in samples for text in sample.texts}) > 1 and len(samples) > 1
    allowed = {
        "retrieval": with_texts and several,
        "zero-shot": labelled,
        "agreement": has(reference, "embeddings"),
        "transcription": all(sample.audio and len(sample.texts) == 1 and not sample.question for sample in samples),
        "vqa": with_texts and all(sample.question for sample in samples),
        "captioning": with_texts and several and all(s.shown and not s.audio and not s.question for s in samples),
        "perplexity": with_texts,
        "answer-agreement": has(reference, "answers"),
    }
    return [name for name, possible in allowed.items() if possible and TASKS[name].needs in gives]


def _nothing(dataset: Dataset, gives: Collection[Need]) -> UsageError:
    if "embeddings" in gives:
        text = f"{dataset.name} has neither texts nor labels for every sample, so no task can run"
        return UsageError(text, hint="add a text or a label to every sample")
    if "answers" in gives:
        text = f"{dataset.name} has not {' or '.join(JUDGED.values())} for every sample, so no task can run"
        return UsageError(text, hint="add a text to every sample: its transcript, its caption, or the answers accepted")
    return UsageError("this model gives neither embeddings nor answers", hint="evaluate another model")


def _require_answers(chosen: Sequence[str], samples: Sequence[Sample], wording: Wording) -> None:
    """Raise UsageError for the first sample that lacks what one of the tasks of answers needs."""
    if "transcription" in chosen:
        _require_transcripts(samples, wording)
    for sample in samples:
        if "vqa" in chosen and not sample.question:
            raise UsageError(f"sample '{sample.key}' has no question", hint="vqa needs one for every sample")
        if "captioning" in chosen and sample.question:
            raise UsageError(f"sample '{sample.key}' has a question", hint="its task is vqa")
        if "captioning" in chosen and not sample.shown:
            raise UsageError(f"sample '{sample.key}' has no image", hint="captioning needs one for every sample")
        for name in ("vqa", "captioning", "perplexity"):
            if name in chosen and not sample.texts:
                raise UsageError(f"sample '{sample.key}' has no text", hint=f"{name} needs one for every sample")
    if "captioning" in chosen and len({text for sample in samples for text in sample.texts}) < 2:
        raise UsageError("captioning needs 2 samples with different captions", hint="CIDEr asks which words are rare")


def _require_transcripts(samples: Sequence[Sample], wording: Wording) -> None:
    for sample in samples:
        if not sample.audio:
            raise UsageError(f"sample '{sample.key}' has no recording", hint="transcription needs one for every sample")
        if len(sample.texts) != 1:
            raise UsageError(
                f"sample '{sample.key}' has {len(sample.texts)} texts, and transcription needs one for every recording",
                hint="keep the transcript alone",
            )
        if not wording.words(sample.texts[0]):
            raise UsageError(
                f"the transcript of sample '{sample.key}' has no words: {sample.texts[0]!r}",
                hint="leave the sample out; what is said to silence is measured anyway",
            )
