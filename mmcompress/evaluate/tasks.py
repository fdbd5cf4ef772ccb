"""The tasks: those of a dual encoder, from embeddings to one value a sample; those of answers are in `answer_tasks`."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from mmcompress.data import Dataset
from mmcompress.errors import UsageError
from mmcompress.evaluate import metrics
from mmcompress.evaluate.answer_tasks import (
    answer_agreement,
    captioning,
    perplexity,
    question_answering,
    transcription,
)
from mmcompress.evaluate.answers import Need
from mmcompress.evaluate.scene import Measured, Scene, Task, Unit


def retrieval(scene: Scene) -> dict[str, Measured]:
    """Recall at 1, 5 and 10 from each image (or recording) to the texts, and from each distinct text to the images."""
    found = scene.embeddings
    if len(found.texts) < 2 or len(found.keys) < 2:
        raise UsageError(
            f"retrieval needs 2 samples and 2 different texts; the data has {len(found.keys)} and {len(found.texts)}",
            hint="use more data",
        )
    to_text = metrics.ranks(found.images, found.text_vectors, found.pairs)
    to_image = metrics.ranks(found.text_vectors, found.images, found.pairs[:, ::-1])
    return {
        **_recalls(
            f"{found.media}_to_text_r", to_text, found.pairs, len(found.texts), "image", np.arange(len(found.keys))
        ),
        **_recalls(
            f"text_to_{found.media}_r", to_image, found.pairs[:, ::-1], len(found.keys), "text", found.text_owners
        ),
    }


def zero_shot(scene: Scene) -> dict[str, Measured]:
    """Top-1 and top-5 accuracy of naming each image's class, by the similarity to the classes' averaged prompts."""
    if scene.class_vectors is None or scene.class_index is None:
        raise UsageError("zero-shot needs classes", hint="put a classes.json beside the data")
    pairs = metrics.labels_as_pairs(scene.class_index)
    rank = metrics.ranks(scene.embeddings.images, scene.class_vectors, pairs)
    return _recalls("top", rank, pairs, len(scene.class_vectors), "image", np.arange(len(rank)), depths=(1, 5))


def agreement(scene: Scene) -> dict[str, Measured]:
    """How alike the reference and this model are: cosine of each embedding, same nearest text, same ten nearest texts."""
    if scene.reference is None or scene.reference.embedded is None:
        raise UsageError("agreement needs embeddings to agree with", hint="evaluate the original too (--baseline)")
    mine, other = scene.embeddings, scene.reference.embeddings
    images = np.arange(len(mine.keys))
    found: dict[str, Measured] = {}
    if mine.images.shape == other.images.shape:
        cosine = metrics.cosines(mine.images, other.images)
        found[f"{mine.media}_cosine"] = Measured(cosine, "image", images, share=False)
        if mine.texts and mine.texts == other.texts:
            text_cosine = metrics.cosines(mine.text_vectors, other.text_vectors)
            found["text_cosine"] = Measured(text_cosine, "text", mine.text_owners, share=False)
    gallery, other_gallery = _galleries(scene, scene.reference)
    if gallery is not None and other_gallery is not None and len(gallery) > 1:
        deep = min(10, len(gallery))
        first = metrics.nearest(mine.images, gallery, deep)
        second = metrics.nearest(other.images, other_gallery, deep)
        same = (first[:, 0] == second[:, 0]).astype(np.float32)
        found["top1"] = Measured(same, "image", images, chance=1 / len(gallery))
        if len(gallery) > 10:
            found["top10_overlap"] = Measured(metrics.overlap(first, second), "image", images, chance=10 / len(gallery))
    return found


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "retrieval",
            "find the text of an image or a recording, and the other way round: recall at 1, 5 and 10",
            ("image_to_text_r1", "text_to_image_r1", "audio_to_text_r1", "text_to_audio_r1"),
            retrieval,
        ),
        Task(
            "zero-shot",
            "name the class of an image or a recording from prompts: top-1 and top-5 accuracy",
            ("top1",),
            zero_shot,
        ),
        Task(
            "agreement",
            "how alike the reference and the compressed model are: cosine, same nearest text, overlap of the ten nearest",
            ("top1",),
            agreement,
            relative=True,
        ),
        Task(
            "transcription",
            "write down what is said: word accuracy, which is 1 - WER",
            ("word_accuracy",),
            transcription,
            needs="answers",
        ),
        Task(
            "vqa",
            "answer questions about pictures: exact match with an accepted answer after the normalisation of VQA",
            ("accuracy",),
            question_answering,
            needs="answers",
        ),
        Task(
            "captioning",
            "say what is in a picture: CIDEr-D, exact match, keywords",
            ("cider",),
            captioning,
            needs="answers",
        ),
        Task(
            "perplexity",
            "how probable the right answers are: mean log-likelihood of a token, whose negative exponential is perplexity",
            ("answer_log_likelihood",),
            perplexity,
            needs="likelihoods",
        ),
        Task(
            "answer-agreement",
            "how alike the answers of the reference and the compressed model are: identical, edits, where they part",
            ("identical",),
            answer_agreement,
            needs="answers",
            relative=True,
        ),
    )
}


def usual_tasks(gives: Collection[Need], dataset: Dataset) -> tuple[str, ...]:
    """Return what a compression is judged by where no task is asked for, for a model that `gives` so much and such data."""
    found = ["retrieval"] if "embeddings" in gives else []
    if "answers" in gives:
        samples = list(dataset)
        heard, asked = all(sample.audio for sample in samples), all(sample.question for sample in samples)
        found.append("transcription" if heard else "vqa" if asked else "captioning")
    return tuple(found)


def is_relative(name: str) -> bool:
    """Whether a task is itself a comparison; one that is not ours (lm-eval's) is none."""
    return name in TASKS and TASKS[name].relative


def relative_tasks(gives: Collection[Need]) -> list[str]:
    """Return the tasks that set what a model `gives` beside a reference."""
    return [task.name for task in TASKS.values() if task.relative and task.needs in gives]


def _recalls(
    prefix: str,
    rank: NDArray[np.int64],
    pairs: NDArray[np.int64],
    gallery: int,
    unit: Unit,
    owners: NDArray[np.int64],
    depths: tuple[int, ...] = (1, 5, 10),
) -> dict[str, Measured]:
    # Among ten texts the right one is always within ten: such a metric would say 1.0 of anything.
    return {
        f"{prefix}{k}": Measured(
            metrics.within(rank, k), unit, owners, chance=metrics.chance(pairs, len(rank), gallery, k)
        )
        for k in depths
        if k < gallery
    }


def _galleries(scene: Scene, reference: Scene) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Return what both models may name for an image: the same texts, else the same number of classes, else nothing."""
    if scene.embeddings.texts and scene.embeddings.texts == reference.embeddings.texts:
        return scene.embeddings.text_vectors, reference.embeddings.text_vectors
    mine, other = scene.class_vectors, reference.class_vectors
    if mine is None or other is None or len(mine) != len(other):
        return None, None
    return mine, other
