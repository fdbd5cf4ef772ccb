"""Distilling a dual encoder: from settings, model and data to its losses and to what the teacher says of every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Json
from mmcompress.passes.base import Context
from mmcompress.passes.distill_data import Corpus, Feeder, Rows, read_corpus
from mmcompress.passes.distill_job import Job
from mmcompress.passes.distill_objective import Objective
from mmcompress.passes.distill_pair_lesson import PairLesson
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_targets import Table, Targets, digest, embed_once, item_of, of_tower

if TYPE_CHECKING:
    from mmcompress.data import Dataset
    from mmcompress.passes.distill import Distill

BATCH = 64


@dataclass(frozen=True)
class PairJob(Job):
    """Images and texts."""

    corpus: Corpus

    @property
    def size(self) -> int:
        """How many training samples one epoch has."""
        return self.corpus.size

    @property
    def held_back(self) -> int:
        """Samples that do not train; 0 where the data is so small that all serve for both."""
        rows = "images" if len(self.corpus.train.images) else "texts"
        train, held = getattr(self.corpus.train, rows), getattr(self.corpus.held, rows)
        return 0 if np.isin(held, train).any() else len(held)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the data."""
        if self.settings.pairing != "auto" or self.corpus.paired or not self.corpus.pairs:
            return ()
        return (
            f"{self.corpus.pairs} of {self.corpus.samples} samples have an image and a text; because not all do, "
            "distill takes images and texts as unpaired",
        )

    def decisions(self, bundle: Bundle) -> dict[str, Json]:
        """Return what to record of all this."""
        return {**super().decisions(bundle), "paired": self.corpus.paired}

    def lesson(
        self, bundle: Bundle, teacher: Bundle, ranks: Ranks, folder: Path | None, context: Context, half: bool
    ) -> PairLesson:
        """Return what the steps learn from; the teacher is needed afterwards only where it sees changed images.

        Raises UsageError for a loss that the data or the widths do not allow.
        """
        settings = self.settings
        live = teacher if teacher_is_live(settings) and "vision" in self.towers else None
        feeder = Feeder(
            corpus=self.corpus, student=bundle, towers=self.towers, batch_size=self.batch_size,
            accumulate=settings.accumulate, seed=self.seed, rank=ranks.rank, world=ranks.world,
            augment=settings.augment, live=live,
        )  # fmt: skip
        objective = make_objective(settings, bundle, teacher, self.corpus)
        targets = make_targets(self, bundle, teacher, objective, live, folder, ranks, context)
        return PairLesson(bundle, feeder, objective, targets, ranks, half)


def read_pairs(
    settings: Distill, bundle: Bundle, data: Dataset, context: Context, teacher: Callable[[], Bundle]
) -> PairJob:
    """Look at the data. Raises UsageError when it lacks what a named tower or a named loss needs."""
    if settings.cross_entropy:
        raise UsageError(
            f"distill.cross_entropy is {settings.cross_entropy}, but {bundle.family.name} models do not answer in text",
            hint="leave it out",
        )
    seed = context.seed if settings.seed is None else settings.seed
    corpus = read_corpus(data, settings.pairing, seed)
    present = {tower.name: len(of_tower(corpus.train, tower.name)) > 0 for tower in bundle.towers()}
    for name in settings.towers:
        if not present.get(name, True):
            raise UsageError(
                f"distill.towers names '{name}', but the data has no {'images' if name == 'vision' else 'texts'}",
                hint="leave the tower out, or add them to the data",
            )
    towers = tuple(name for name in present if (name in settings.towers if settings.towers else present[name]))
    return PairJob(settings, data, towers, teacher, seed, settings.batch_size or BATCH, corpus)


def teacher_is_live(settings: Distill) -> bool:
    """Whether the teacher runs in every step."""
    return settings.augment if settings.cache_teacher is None else not settings.cache_teacher


def make_objective(settings: Distill, bundle: Bundle, teacher: Bundle, corpus: Corpus) -> Objective:
    """Return the losses with defaults filled in. Raises UsageError for one that the data or the widths do not allow."""
    for name in ("interactive", "logit"):
        if getattr(settings, name) and not corpus.paired:
            raise UsageError(
                f"distill.{name} is {getattr(settings, name)}, but the data is not paired",
                hint="use affinity, which needs no pairs, or give every sample an image and a text",
            )
    both = len(corpus.train.images) > 0 and len(corpus.train.texts) > 0
    if settings.affinity and not both:
        raise UsageError(
            f"distill.affinity is {settings.affinity}, but the data has one modality only", hint="set affinity to 0"
        )
    (student_scale, student_bias), (scale, bias) = (
        [float(value.detach()) for value in model.dual.similarity(model.model)] for model in (bundle, teacher)
    )
    objective = Objective(
        feature=settings.feature,
        interactive=float(corpus.paired) if settings.interactive is None else settings.interactive,
        relational=settings.relational,
        logit=settings.logit,
        affinity=float(both and not corpus.paired) if settings.affinity is None else settings.affinity,
        temperature=settings.temperature,
        paired=corpus.paired,
        student=(student_scale, student_bias),
        teacher=(scale, bias),
    )
    if not objective.active:
        raise UsageError("no loss of distill has a weight for this data", hint="set feature or relational above 0")
    own, other = _width(bundle), _width(teacher)
    if objective.compares_spaces and own != other:
        raise UsageError(
            f"the student's vectors have {own} channels, the teacher's {other}",
            hint="set feature, interactive and affinity to 0: relational and logit compare similarities only",
        )
    return objective


def make_targets(
    job: PairJob, bundle: Bundle, teacher: Bundle, objective: Objective, live: Bundle | None,
    folder: Path | None, ranks: Ranks, context: Context,
) -> Targets:  # fmt: skip
    """Compute what stays the same all through the run: the teacher's vectors, and those of frozen student towers."""
    corpus, held, size = job.corpus, job.corpus.held, job.batch_size
    used = corpus.used(corpus.size if job.steps is None else job.steps * job.samples_per_step, job.seed)
    plain = Rows(held.images if live else used.images, used.texts)
    present = [tower.name for tower in bundle.towers() if len(of_tower(used, tower.name))]
    frozen = [name for name in present if name not in job.towers and objective.needs_frozen_student]

    def table(model: Bundle, tower: str, label: str) -> Table:
        rows = of_tower(plain, tower)
        identity = digest(model, corpus.data.fingerprint(), rows, tower, size)
        return embed_once(
            model, tower, rows, item_of(corpus, tower), batch_size=size,
            folder=folder / f"{tower}-{identity}" if folder else None,
            ranks=ranks, progress=context.progress, label=f"{label}, {tower}",
        )  # fmt: skip

    return Targets(
        teacher={
            name: table(teacher, name, "teacher")
            for name in present
            if objective.needs_both_towers or name in job.towers
        },
        frozen={name: table(bundle, name, "frozen tower") for name in frozen},
        live=live,
    )


@torch.no_grad()
def _width(bundle: Bundle) -> int:
    tower = bundle.towers()[0].name
    return bundle.encode(tower, bundle.example_inputs(tower)).shape[-1]
