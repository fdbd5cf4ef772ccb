"""What a model that answers about pictures scores without looking: the same questions with a blank picture, with another sample's,
with none, and the one answer that is most often right.

Each score stands beside what the model loses by it on the same samples. A model that loses nothing with another sample's picture
does not look, however good its score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from mmcompress.data import Dataset, Sample
from mmcompress.errors import UsageError
from mmcompress.evaluate.answers import Answering, Answers, answer, picture_of
from mmcompress.evaluate.controls import BLANK, BLIND, CONTROL_SAMPLES, SHUFFLED, Control
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.scene import Measured, Scene
from mmcompress.evaluate.slices import SMALLEST, Part
from mmcompress.evaluate.tasks import TASKS
from mmcompress.evaluate.vqa import answer_words

LOOKING = ("vqa", "captioning")
"""The tasks whose answers must come from the picture."""
TEXT_ONLY = "text only: the question without a picture"


def answer_controls(
    model: Answering, dataset: Dataset, scene: Scene, tasks: Sequence[str], parts: Sequence[Part], seed: int, batch: int
) -> list[Control]:
    """Return what `model` scores without looking, on up to 32 samples (another sample's picture: 64), and the commonest answer on
    all samples and on each group."""
    found: list[Control] = []
    for task in LOOKING:
        if task in tasks:
            found += _unseen(model, dataset, scene, task, seed, batch)
            found += _commonest(scene, task, parts, seed)
    return found


def looking_findings(seen: Sequence[Control]) -> list[Finding]:
    """Return that a model does not look where another sample's picture does not measurably lower its score."""
    found = []
    for control in seen:
        if control.name != SHUFFLED or control.lost is None or control.lost.low > 0:
            continue
        lost, enough = control.lost, control.lost.n >= SMALLEST
        text = f"{control.task} {control.metric} {control.estimate.value:.3f} with another sample's picture, "
        text += f"{lost.value:+.3f} [{lost.low:+.3f}, {lost.high:+.3f}] with its own, n={lost.n}"
        what = "DOES NOT LOOK" if enough else "not seen to look (few samples)"
        found.append(Finding("bad" if enough else "note", f"{what}: {text}"))
    return found


def _unseen(model: Answering, dataset: Dataset, scene: Scene, task: str, seed: int, batch: int) -> list[Control]:
    metric = TASKS[task].headlines[0]
    changes: tuple[tuple[str, int, Callable[[list[Sample]], list[Sample]]], ...] = (
        (SHUFFLED, 2 * CONTROL_SAMPLES, partial(_with_other_pictures, seed=seed)),
        (BLANK, CONTROL_SAMPLES, _with_blank_pictures),
        (TEXT_ONLY, CONTROL_SAMPLES, _without_pictures),
    )
    found = []
    shown = [row for row, sample in enumerate(dataset) if sample.shown]
    for name, most, change in changes:
        rows = shown[:most]
        changed = change([dataset[row] for row in rows]) if task == "vqa" or change is not _without_pictures else []
        try:
            said = [text for at in range(0, len(changed), batch) for text in answer(model, changed[at : at + batch])]
        except UsageError:
            # A model that cannot be asked without a picture has no such control.
            if change is not _without_pictures:
                raise
            continue
        if said:
            was = [scene.answers.texts[row] for row in rows]
            own, other = (_score(scene, task, metric, texts, rows) for texts in (was, said))
            found.append(Control(name, task, metric, other.estimate(seed), None, own.difference(other, seed)))
    return found


def _commonest(scene: Scene, task: str, parts: Sequence[Part], seed: int) -> list[Control]:
    """What always giving one accepted answer scores: the one that most samples of the whole, and of each group, accept."""
    metric = TASKS[task].headlines[0]
    everything = np.ones(len(scene.keys), dtype=bool)
    groups = [(f"{BLIND} of {part.name}", part.samples) for part in parts if part.name.startswith("group=")]
    found = []
    for name, chosen in ((BLIND, everything), *groups):
        said = _favourite([several for several, inside in zip(scene.answers.references, chosen, strict=True) if inside])
        always = _score(scene, task, metric, [said] * len(scene.keys), range(len(scene.keys)))
        found.append(Control(name, task, metric, always.estimate(seed, chosen), None))
    return found


def _favourite(references: Sequence[tuple[str, ...]]) -> str:
    """Return the answer that most samples accept; of equals the first."""
    spelled = {tuple(answer_words(text)): text for several in reversed(references) for text in reversed(several)}
    counts = Counter(words for several in references for words in {tuple(answer_words(text)): None for text in several})
    return spelled[counts.most_common(1)[0][0]]


def _score(scene: Scene, task: str, metric: str, texts: Sequence[str], rows: Sequence[int]) -> Measured:
    """Measure other answers to some samples."""
    answers = scene.answers
    owners, references = answers.owners.tolist(), answers.references
    said = Answers(
        tuple(texts), tuple(references[row] for row in rows), answers.wording, tuple(owners[row] for row in rows)
    )
    return TASKS[task].measure(Scene(tuple(scene.keys[row] for row in rows), answered=said))[metric]


def _with_other_pictures(samples: list[Sample], seed: int) -> list[Sample]:
    """Give every sample another picture: the next one in a random circle of all; nothing where there is only one picture."""
    owners = {picture_of(sample): sample for sample in samples}
    if len(owners) < 2:
        return []
    names = list(owners)
    circle = [names[place] for place in np.random.default_rng(seed).permutation(len(names))]
    other = {name: owners[after] for name, after in zip(circle, circle[1:] + circle[:1], strict=True)}
    shown = [other[picture_of(sample)] for sample in samples]
    return [sample.showing(own.pictures, own.video) for sample, own in zip(samples, shown, strict=True)]


def _with_blank_pictures(samples: list[Sample]) -> list[Sample]:
    return [sample.redrawn(lambda image: Image.new("RGB", image.size, "white")) for sample in samples]


def _without_pictures(samples: list[Sample]) -> list[Sample]:
    return [sample.showing(()) for sample in samples]
