"""What tasks look at, and what they return: a dataset as a model embeds or answers it, and one value for every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmcompress.evaluate.answers import Answers, Need
from mmcompress.evaluate.embed import Embeddings
from mmcompress.evaluate.likelihoods import Likelihoods
from mmcompress.ops.statistics import Estimate, bootstrap, paired_difference, proportion

Unit = Literal["image", "text", "sample"]


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything a task may look at: what a model made of N samples. What was not asked for is None."""

    keys: tuple[str, ...]
    """The N samples, in order."""
    embedded: Embeddings | None = None
    answered: Answers | None = None
    read: Likelihoods | None = None
    """How probable the model finds the right answers."""
    class_vectors: NDArray[np.float32] | None = None
    """(K, C), where the data has classes."""
    class_index: NDArray[np.int64] | None = None
    """(N,) the right class of each image."""
    reference: Scene | None = None
    """The same samples as the model to compare with sees them."""

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings, for tasks that need them."""
        assert self.embedded is not None, "tasks that need embeddings run only where there are some"
        return self.embedded

    @property
    def answers(self) -> Answers:
        """The answers, for tasks that need them."""
        assert self.answered is not None, "tasks that need answers run only where there are some"
        return self.answered

    @property
    def likelihoods(self) -> Likelihoods:
        """The probabilities of right answers, for tasks that need them."""
        assert self.read is not None, "tasks that need likelihoods run only where there are some"
        return self.read

    @property
    def texts(self) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
        """What the data says of the samples: the distinct texts embedded, or the references of each answer."""
        if self.embedded is not None:
            return self.embedded.texts
        return self.answered.references if self.answered is not None else ()


@dataclass(frozen=True, eq=False)
class Measured:
    """One metric, higher is better, with its value for every sample."""

    values: NDArray[np.float32]
    """(n,)"""
    unit: Unit
    """What a sample is: one of the N images or samples, or one of the M texts."""
    owners: NDArray[np.int64]
    """(n,) the image each sample belongs to: captions of one image are not independent."""
    share: bool = True
    """Whether values lie in 0..1, so that the mean is a proportion."""
    chance: float | None = None
    """What a random ranking would score, or an answer without content, where that is known."""
    weights: NDArray[np.float32] | None = None
    """(n,) what each sample counts for, such as its words: the metric is then sum(weight * value) / sum(weight)."""

    @property
    def mean(self) -> float:
        """The metric's value."""
        return float(np.average(self.values, weights=self.weights))

    def estimate(self, seed: int, chosen: NDArray[np.bool_] | None = None) -> Estimate:
        """Return the mean with its interval, of all samples or of those `chosen` (n,)."""
        values, clusters, weights = self._chosen(self.values, chosen)
        if weights is not None and not (np.all(values == 0) or np.all(values == 1)):
            return bootstrap(values, seed=seed, clusters=clusters, weights=weights)
        # All right, or all wrong: how many samples may yet be otherwise does not depend on what they weigh.
        proper = self.share or weights is not None
        return (proportion if proper else bootstrap)(values, seed=seed, clusters=clusters)

    def difference(self, before: Measured, seed: int, chosen: NDArray[np.bool_] | None = None) -> Estimate:
        """Return this minus `before`, sample by sample, with its interval. Raises ValueError when samples differ.

        Where no value changed, the interval is what n unchanged samples can exclude, not the point 0.
        """
        values, clusters, weights = self._chosen(self.values, chosen)
        earlier, _, weighed = before._chosen(before.values, chosen)
        if not np.array_equal(_or_ones(weights), _or_ones(weighed)):
            raise ValueError("paired samples differ in weight")
        found = paired_difference(earlier, values, seed=seed, clusters=clusters, weights=weights)
        if (self.share or weights is not None) and np.array_equal(values, earlier):
            unseen = proportion(np.zeros(found.n)).high
            return Estimate(0.0, -unseen, unseen, found.n)
        return found

    def _chosen(
        self, values: NDArray[np.float32], chosen: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64] | None, NDArray[np.float32] | None]:
        owners, weights = self.owners, self.weights
        if chosen is not None:
            values, owners = values[chosen], owners[chosen]
            weights = None if weights is None else weights[chosen]
        return values, owners if len(np.unique(owners)) < len(owners) else None, weights


Results = dict[str, dict[str, Measured]]
"""What was measured, by task and metric."""


@dataclass(frozen=True)
class Task:
    """One way to ask how good a model is."""

    name: str
    about: str
    headlines: tuple[str, ...]
    """The metrics a verdict speaks about."""
    measure: Callable[[Scene], dict[str, Measured]]
    """Raises UsageError when the data lacks what the task needs."""
    needs: Need = "embeddings"
    """What a model must give."""
    relative: bool = False
    """Whether it is itself a comparison with a reference, and not to be compared once more."""


def has(scene: Scene | None, need: Need) -> bool:
    """Whether `scene` holds what a task needs."""
    parts = {"embeddings": "embedded", "answers": "answered", "likelihoods": "read"}
    return getattr(scene, parts[need], None) is not None


def _or_ones(weights: NDArray[np.float32] | None) -> NDArray[np.float32]:
    return np.ones(1, dtype=np.float32) if weights is None else weights
