"""Distilling a model that answers in text: what its towers learn of a teacher, sample by sample.

The tower that writes is led through the data's answer and learns the teacher's distribution of each next token; every other tower
learns the teacher's hidden states. No sample's loss depends on another's, so pieces of a batch go through one after the other. A
teacher's distributions are T * V numbers a sample, 7 MB for the vocabulary of Whisper: they are computed along with the student's
and never kept.

Shape alphabet: B batch, T tokens of an answer, V vocabulary, C channels, M all tokens of the answers of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import losses
from mmcompress.passes.base import Context
from mmcompress.passes.distill_data import ahead, shuffled, split
from mmcompress.passes.distill_job import Job
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_train import Student

if TYPE_CHECKING:
    from mmcompress.data import Dataset
    from mmcompress.passes.distill import Distill

BATCH = 8
Inputs = dict[str, dict[str, Tensor]]
"""Per tower what `encode` takes."""


@dataclass(frozen=True)
class Piece:
    """Samples that go through the towers at once."""

    inputs: Inputs
    teacher: Inputs
    """The same tensors where both models take the same."""


@dataclass(frozen=True)
class AnswerJob(Job):
    """Samples with what they are about and the text to answer."""

    train: np.ndarray
    """Numbers of the samples to train on."""
    held: np.ndarray
    """Numbers of the samples to measure on."""
    lacking: int
    """Samples that lack what one of the towers needs."""

    @property
    def size(self) -> int:
        """How many training samples one epoch has."""
        return len(self.train)

    @property
    def held_back(self) -> int:
        """Samples that do not train; 0 where the data is so small that all serve for both."""
        return 0 if np.isin(self.held, self.train).any() else len(self.held)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the data."""
        if not self.lacking:
            return ()
        return (f"{self.lacking} samples lack what {' or '.join(self.towers)} needs, and are left out of distill",)

    def lesson(
        self, bundle: Bundle, teacher: Bundle, ranks: Ranks, folder: Path | None, context: Context, half: bool
    ) -> AnswerLesson:
        """Return what the steps learn from. Raises UsageError when the teacher's towers do not fit the student's."""
        alike = {name: _takes_the_same(bundle, teacher, name) for name in self.towers}
        return AnswerLesson(self, bundle, teacher, ranks, alike, half)


def read_answers(
    settings: Distill, bundle: Bundle, data: Dataset, context: Context, teacher: Callable[[], Bundle]
) -> AnswerJob:
    """Look at the data. Raises UsageError when it lacks what a named tower needs, and for settings of models that embed."""
    for name in ("interactive", "logit", "affinity", "augment"):
        if getattr(settings, name):
            raise UsageError(
                f"distill.{name} is {getattr(settings, name)}, which is for models that embed; "
                f"{bundle.family.name} models answer in text",
                hint="leave it out; theirs are answer, cross_entropy and hidden",
            )
    if settings.cache_teacher:
        raise UsageError(
            "distill.cache_teacher is set, but what a teacher answers is too much to keep",
            hint="leave it out: the teacher of a model that answers in text runs in every step",
        )
    seed = context.seed if settings.seed is None else settings.seed
    names = [tower.name for tower in bundle.towers()]
    has = np.array([[bool(bundle.items(name, sample)) for name in names] for sample in data]).reshape(-1, len(names))
    present = {name: bool(has[:, place].any()) for place, name in enumerate(names)}
    for name in settings.towers:
        if not present.get(name, True):
            raise UsageError(
                f"distill.towers names '{name}', but no sample of the data has what it needs",
                hint="leave the tower out, or give every sample its text and what it is about",
            )
    towers = tuple(name for name in names if (name in settings.towers if settings.towers else present[name]))
    if not towers:
        raise UsageError(
            f"no sample of the data has what {' or '.join(names)} needs",
            hint="give every sample its text and what it is about",
        )
    for name in towers:
        weights = ("answer", "cross_entropy") if name == bundle.forced.answering else ("hidden",)
        if not any(getattr(settings, weight) for weight in weights):
            raise UsageError(
                f"no loss of distill has a weight for {name}",
                hint=f"set {weights[0]} above 0, or towers without {name}",
            )
    complete = has[:, [names.index(name) for name in towers]].all(axis=1)
    if not complete.any():
        raise UsageError(
            f"no sample has what all of {', '.join(towers)} need", hint="name fewer towers, or complete the data"
        )
    train, held = split(np.flatnonzero(complete), seed)
    lacking = int((~complete).sum())
    return AnswerJob(settings, data, towers, teacher, seed, settings.batch_size or BATCH, train, held, lacking)


@dataclass
class AnswerLesson:
    """Towers that learn hidden states, and one that learns to write."""

    job: AnswerJob
    bundle: Bundle
    teacher: Bundle
    ranks: Ranks
    alike: dict[str, bool]
    """Whether both models take the same inputs; a student with fewer image tokens does not."""
    half: bool = False
    """Compute the towers in bfloat16; weights and losses stay in float32."""
    _student: nn.Module = field(init=False)

    @property
    def samples(self) -> int:
        """Samples of one step, over all processes."""
        return self.job.samples_per_step

    def begin(self) -> None:
        """Wrap the student for data parallelism."""
        self._student = self.ranks.wrap(Student(self.bundle, self.half))

    def batch(self, step: int) -> list[Piece]:
        """Return this process's share of step `step`, prepared."""
        size = self.job.batch_size
        share = size * self.job.settings.accumulate
        first = step * self.samples + self.ranks.rank * share
        rows = shuffled(self.job.train, np.arange(first, first + share), self.job.seed)
        return [self._piece(rows[at : at + size]) for at in range(0, share, size)]

    def batches(self, first: int, last: int) -> Iterator[list[Piece]]:
        """Yield the batches of steps `first` to `last`, without the last."""
        return ahead(self.batch, first, last)

    def gradients(self, batch: list[Piece], step: int) -> float:
        """Add the gradient of the loss over all processes' samples to the parameters; return the loss."""
        total = torch.zeros(1, device=self.bundle.device)
        devices = [total.device.index or 0] if total.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # Whatever draws random numbers in a forward draws the same after a resume.
            torch.manual_seed(self.job.seed + step)
            for number, piece in enumerate(batch):
                with torch.enable_grad(), self.ranks.alone(self._student, last=number == len(batch) - 1):
                    loss = self._loss(piece, self._student(piece.inputs))[0] / len(batch)
                    loss.backward()
                total += loss.detach()
        # Data parallelism averages gradients; so is the loss the mean over processes.
        return float(self.ranks.gather(total).mean())

    @torch.no_grad()
    def examine(self) -> dict[str, float]:
        """Return the loss on the held-back samples, and for each trained tower the mean cosine to the teacher there."""
        rows, size, student = self.job.held, self.job.batch_size, Student(self.bundle, half=False)
        sums: dict[str, float] = {}
        for at in range(0, len(rows), size):
            piece = self._piece(rows[at : at + size])
            loss, cosines = self._loss(piece, student(piece.inputs), half=False)
            for name, value in {"loss": loss, **cosines}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(rows[at : at + size])
        return {name: value / len(rows) for name, value in sums.items()}

    def _piece(self, rows: np.ndarray) -> Piece:
        samples = [self.job.data[int(row)] for row in rows]
        inputs: Inputs = {}
        teacher: Inputs = {}
        for name in self.job.towers:
            inputs[name] = self.bundle.prepare(name, [self.bundle.items(name, sample)[0] for sample in samples])
            own = self.alike[name]
            teacher[name] = (
                inputs[name]
                if own
                else self.teacher.prepare(name, [self.teacher.items(name, sample)[0] for sample in samples])
            )
        return Piece(inputs, teacher)

    def _loss(
        self, piece: Piece, made: dict[str, Tensor], half: bool | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a piece's samples, and each tower's mean cosine to the teacher."""
        with torch.no_grad():
            goals = Student(self.teacher, self.half if half is None else half)(piece.teacher)
        terms, cosines = [], {}
        for name, rows in made.items():
            goal, settings = goals[name], self.job.settings
            if name != self.bundle.forced.answering:
                terms.append(settings.hidden * losses.hidden(rows, goal))
                cosines[name] = nn.functional.cosine_similarity(rows.detach(), goal).mean()
                continue
            own = self.bundle.forced.next_tokens(self.bundle.model, piece.inputs[name])
            other = self.teacher.forced.next_tokens(self.teacher.model, piece.teacher[name])
            roots, wanted = _places(rows, own), _places(goal, other)
            # Every answer counts the same, however long it is.
            shares = (1 / (own >= 0).sum(1, keepdim=True).clamp_min(1) / len(own)).expand_as(own)[own >= 0]
            if settings.answer:
                terms.append(settings.answer * (shares * losses.answer_kl(roots, wanted)).sum())
            if settings.cross_entropy:
                surprise = -losses.token_log_likelihoods(roots, own[own >= 0])
                terms.append(settings.cross_entropy * (shares * surprise).sum())
            cosines[name] = (shares * nn.functional.cosine_similarity(roots.detach(), wanted)).sum()
        return torch.stack(terms).sum(), cosines


def _places(rows: Tensor, tokens: Tensor) -> Tensor:
    """Return (M, V): the roots at the places of an answer's tokens; rows (B, T * V), tokens (B, T)."""
    return rows.unflatten(1, (tokens.shape[1], -1))[tokens >= 0]


@torch.no_grad()
def _takes_the_same(student: Bundle, teacher: Bundle, tower: str) -> bool:
    """Return whether both models take the same inputs. Raises UsageError when what they make of them cannot be compared."""
    if student.family.name != teacher.family.name:
        raise UsageError(
            f"the student is a {student.family.name} model, the teacher a {teacher.family.name} model",
            hint="take a teacher of the same family",
        )
    own, other = (bundle.example_inputs(tower) for bundle in (student, teacher))
    width, wanted = (_width(bundle, tower) for bundle in (student, teacher))
    if width != wanted:
        what = "words of the vocabulary" if tower == student.forced.answering else "values in its hidden states"
        raise UsageError(
            f"the student's {tower} has {width} {what}, the teacher's {wanted}",
            hint=f"take a teacher of the same size, or distill the other towers only (towers without {tower})",
        )
    if _turned(student, tower) != _turned(teacher, tower):
        raise UsageError(
            f"rotate has turned the channels of what the {tower} tower gives out in one of student and teacher, not in the other",
            hint=f"put rotate after distill, or distill the other towers only (towers without {tower})",
        )
    # Examples show pictures; of a video one of them may be given less.
    films = [bundle.tower(tower).film for bundle in (student, teacher)]
    if any(film is not None and film.stride > 1 for film in films):
        return False
    return {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in other.items()}


def _turned(bundle: Bundle, tower: str) -> list[Any]:
    """Return the rotations of streams that begin with what a tower gives out, of those in the bundle's history."""
    owner = bundle.tower(tower)
    begun = {
        other.name
        for other in bundle.towers()
        if other.name != tower and other.residual and any(owner.owns(path) for path in other.residual.makers)
    }
    rotations = [
        record for record in bundle.history if record.name == "rotate" and begun & record.plan["streams"].keys()
    ]
    return [(record.params, record.plan["seed"]) for record in rotations]


def _width(bundle: Bundle, tower: str) -> int:
    inputs = bundle.example_inputs(tower)
    width = bundle.encode(tower, inputs).shape[1]
    if tower == bundle.forced.answering:
        width //= bundle.forced.next_tokens(bundle.model, inputs).shape[1]
    return int(width)
