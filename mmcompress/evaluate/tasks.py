"""The tasks of a dual encoder: what each measures, from embeddings to one value a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmcompress.errors import UsageError
from mmcompress.evaluate import metrics
from mmcompress.evaluate.embed import Embeddings
from mmcompress.ops.statistics import Estimate, bootstrap, paired_difference, proportion

Unit = Literal["image", "text"]


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything a task may look at."""

    embeddings: Embeddings
    class_vectors: NDArray[np.float32] | None = None
    """(K, C), where the data has classes."""
    class_index: NDArray[np.int64] | None = None
    """(N,) the right class of each image."""
    reference: Scene | None = None
    """The same samples embedded by the model to compare with."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One metric, higher is better, with its value for every sample."""

    values: NDArray[np.float32]
    """(n,)"""
    unit: Unit
    """What a sample is: one of the N images, or one of the M texts."""
    owners: NDArray[np.int64]
    """(n,) the image each sample belongs to: captions of one image are not independent."""
    share: bool = True
    """Whether values lie in 0..1, so that the mean is a proportion."""
    chance: float | None = None
    """What a random ranking would score, where that is known."""

    def estimate(self, seed: int, chosen: NDArray[np.bool_] | None = None) -> Estimate:
        """Return the mean with its interval, of all samples or of those `chosen` (n,)."""
        values, clusters = self._chosen(self.values, chosen)
        return (proportion if self.share else bootstrap)(values, seed=seed, clusters=clusters)

    def difference(self, before: Measured, seed: int, chosen: NDArray[np.bool_] | None = None) -> Estimate:
        """Return this minus `before`, sample by sample, with its interval. Raises ValueError when samples differ.

        Where no hit changed, the interval is what n unchanged samples can exclude, not the point 0.
        """
        values, clusters = self._chosen(self.values, chosen)
        earlier, _ = self._chosen(before.values, chosen)
        found = paired_difference(earlier, values, seed=seed, clusters=clusters)
        if self.share and np.array_equal(values, earlier):
            unseen = proportion(np.zeros(found.n)).high
            return Estimate(0.0, -unseen, unseen, found.n)
        return found

    def _chosen(
        self, values: NDArray[np.float32], chosen: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
        owners = self.owners
        if chosen is not None:
            values, owners = values[chosen], owners[chosen]
        return values, owners if len(np.unique(owners)) < len(owners) else None


@dataclass(frozen=True)
class Task:
    """One way to ask how good an embedder is."""

    name: str
    about: str
    headlines: tuple[str, ...]
    """The metrics a verdict speaks about."""
    measure: Callable[[Scene], dict[str, Measured]]
    """Raises UsageError when the data lacks what the task needs."""


def retrieval(scene: Scene) -> dict[str, Measured]:
    """Recall at 1, 5 and 10 from each image to the texts, and from each distinct text to the images."""
    found = scene.embeddings
    if len(found.texts) < 2 or len(found.keys) < 2:
        raise UsageError(
            f"retrieval needs 2 images and 2 different texts; the data has {len(found.keys)} and {len(found.texts)}",
            hint="use more data",
        )
    to_text = metrics.ranks(found.images, found.text_vectors, found.pairs)
    to_image = metrics.ranks(found.text_vectors, found.images, found.pairs[:, ::-1])
    return {
        **_recalls("image_to_text_r", to_text, found.pairs, len(found.texts), "image", np.arange(len(found.keys))),
        **_recalls("text_to_image_r", to_image, found.pairs[:, ::-1], len(found.keys), "text", found.text_owners),
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
    if scene.reference is None:
        raise UsageError("agreement needs a reference to agree with", hint="evaluate the original too (--baseline)")
    mine, other = scene.embeddings, scene.reference.embeddings
    images = np.arange(len(mine.keys))
    found: dict[str, Measured] = {}
    if mine.images.shape == other.images.shape:
        cosine = metrics.cosines(mine.images, other.images)
        found["image_cosine"] = Measured(cosine, "image", images, share=False)
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
            "find the text of an image, and the image of a text: recall at 1, 5 and 10",
            ("image_to_text_r1", "text_to_image_r1"),
            retrieval,
        ),
        Task("zero-shot", "name the class of an image from prompts: top-1 and top-5 accuracy", ("top1",), zero_shot),
        Task(
            "agreement",
            "how alike the reference and the compressed model are: cosine, same nearest text, overlap of the ten nearest",
            ("top1",),
            agreement,
        ),
    )
}


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
