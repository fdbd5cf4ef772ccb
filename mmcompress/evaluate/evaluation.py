"""Run tasks over a dataset and keep every sample's value, so that any two runs can be compared pairwise later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset
from mmcompress.errors import UsageError
from mmcompress.evaluate.answer_controls import answer_controls, looking_findings
from mmcompress.evaluate.answer_findings import answer_findings, silence_findings
from mmcompress.evaluate.answers import Answering, Model, abilities, answer_dataset, wording_of
from mmcompress.evaluate.asked import Asked, ask
from mmcompress.evaluate.controls import Control, controls
from mmcompress.evaluate.embed import CutsTexts, Embedder, Embeddings, embed_dataset, embed_texts
from mmcompress.evaluate.findings import Finding, health
from mmcompress.evaluate.likelihoods import read_dataset
from mmcompress.evaluate.metrics import class_vectors
from mmcompress.evaluate.scene import Results, Scene
from mmcompress.evaluate.slices import Slice, measure_slices, parts
from mmcompress.evaluate.tasks import TASKS, is_relative
from mmcompress.ops.statistics import Estimate
from mmcompress.progress import Progress

Comparison = dict[str, dict[str, Estimate]]
"""Paired differences by task and metric."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model scored on one dataset."""

    scene: Scene
    results: Results
    config: dict[str, Any]
    """What was asked: data, its fingerprint, tasks, seed, batch."""
    estimates: Comparison
    """Of each metric, by task."""
    differences: Comparison = field(default_factory=dict)
    """Against the reference, where there was one; negative means lower than the reference."""
    slices: tuple[Slice, ...] = ()
    controls: tuple[Control, ...] = ()
    findings: tuple[Finding, ...] = ()
    """What is wrong with the embeddings or the answers themselves."""

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.scene.keys)

    def to_json(self) -> dict[str, Any]:
        """Return the document `mmc eval --json` prints, close to what lm-eval writes."""
        return {
            "results": {
                task: {
                    metric: {
                        **estimate.to_json(),
                        "chance": self.results[task][metric].chance,
                        **_difference(self.differences, task, metric),
                    }
                    for metric, estimate in by_metric.items()
                }
                for task, by_metric in self.estimates.items()
            },
            "n": self.n,
            "config": self.config,
            "slices": [part.to_json() for part in self.slices],
            "controls": [control.to_json() for control in self.controls],
            "findings": [finding.to_json() for finding in self.findings],
        }


def evaluate(
    model: Model,
    dataset: Dataset,
    tasks: Sequence[str] | None = None,
    reference: Evaluation | None = None,
    seed: int = 0,
    batch: int = 32,
    progress: Progress | None = None,
    language: str | None = None,
) -> Evaluation:
    """Measure `model` on `dataset`, paired with `reference` where one is given.

    `tasks` are names of TASKS; by default all that the model and the data allow. `language` (two letters, by default "en") is
    what answers are written in. Raises UsageError for an unknown task or one the model cannot do, for data that lacks what a
    task needs, and for a reference made on other samples; all of it before the model runs.
    """
    before = reference.scene if reference else None
    asked = ask(dataset, tasks, abilities(model), wording_of(model, language), before)
    if reference is not None:
        same_samples(reference, asked.keys)
        same_classes(reference.scene, len(asked.zero_shot.labels) if asked.zero_shot else 0, asked.class_index)
        _same_content(reference, {**asked.config(), "fingerprint": dataset.fingerprint()})
    scene = _scene(model, dataset, asked, before, batch, progress)
    results = {name: TASKS[name].measure(scene) for name in asked.tasks}
    all_parts = parts(dataset, scene)
    seen = controls(model, dataset, scene, asked.tasks, seed, batch)
    if isinstance(model, Answering) and scene.answered is not None:
        seen += answer_controls(model, dataset, scene, asked.tasks, all_parts, seed, batch)
    earlier = reference.results if reference else {}
    return Evaluation(
        scene,
        results,
        config={**asked.config(), "data": dataset.name, "fingerprint": dataset.fingerprint(), "seed": seed},
        estimates={task: {m: v.estimate(seed) for m, v in values.items()} for task, values in results.items()},
        differences=_differences(results, earlier, seed),
        slices=tuple(measure_slices(results, earlier, all_parts, seed)),
        controls=tuple(seen),
        findings=(
            *_health(scene),
            *answer_findings(scene, results, seed),
            *_leaks(seen),
            *looking_findings(seen),
            *silence_findings(seen, reference.controls if reference else ()),
            *_cut(model, scene.embedded),
        ),
    )


def _scene(
    model: Model, dataset: Dataset, asked: Asked, reference: Scene | None, batch: int, progress: Progress | None
) -> Scene:
    """Let the model embed or answer what the tasks need."""
    embedded = classes = answered = read = None
    if "embeddings" in asked.needs:
        assert isinstance(model, Embedder), "tasks the model cannot do were refused"
        embedded = embed_dataset(model, dataset, batch, progress, asked.with_texts)
        classes = _class_vectors(model, asked, batch, progress)
    if "answers" in asked.needs:
        assert isinstance(model, Answering), "tasks the model cannot do were refused"
        answered = answer_dataset(model, dataset, asked.wording, batch, progress, asked.with_references)
    if "likelihoods" in asked.needs:
        assert isinstance(model, Bundle), "tasks the model cannot do were refused"
        read = read_dataset(model, dataset, batch, progress)
    return Scene(asked.keys, embedded, answered, read, classes, asked.class_index, reference)


def compare(before: Evaluation, after: Evaluation, seed: int = 0) -> Comparison:
    """Return after - before for every metric both have, paired. Raises UsageError when the samples are not the same."""
    same_samples(before, after.scene.keys)
    if before.scene.texts != after.scene.texts:
        raise UsageError("the two evaluations saw different texts", hint="evaluate both on the same data")
    classes = after.scene.class_vectors
    same_classes(before.scene, 0 if classes is None else len(classes), after.scene.class_index)
    _same_content(before, after.config)
    return _differences(after.results, before.results, seed)


def same_samples(reference: Evaluation, keys: Sequence[str]) -> None:
    """Raises UsageError, naming the first difference, when `reference` was not made on exactly these samples."""
    known = reference.scene.keys
    if len(known) != len(keys):
        raise UsageError(
            f"the reference was evaluated on {len(known)} samples, this one on {len(keys)}",
            hint="evaluate both on the same data with the same --num-samples and --seed",
        )
    for index, (mine, other) in enumerate(zip(keys, known, strict=True)):
        if mine != other:
            raise UsageError(
                f"sample {index} is '{mine}' here but '{other}' in the reference",
                hint="evaluate both on the same data with the same --num-samples and --seed",
            )


def _same_content(reference: Evaluation, config: dict[str, Any]) -> None:
    """Raises UsageError when samples of the same names were other files, texts, labels or words for `reference`."""
    if _differs("fingerprint", reference.config, config):
        raise UsageError(
            "the data has changed since the reference was evaluated: the same names, but other files, texts or labels",
            hint="evaluate both on the same data",
        )
    if _differs("wording", reference.config, config):
        raise UsageError(
            f"the reference's words were told apart by '{reference.config['wording']}', these by '{config['wording']}'",
            hint="evaluate both with the same --language and the tokenizer's files of one model",
        )


def _differs(key: str, first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether both say something of `key`, and not the same."""
    return bool(first.get(key) and second.get(key) and first[key] != second[key])


def same_classes(reference: Scene, classes: int, class_index: NDArray[np.int64] | None) -> None:
    """Raises UsageError when both have zero-shot classes that are not the same: accuracies over 2 and over 20 do not pair."""
    if reference.class_vectors is None or reference.class_index is None or class_index is None:
        return
    known = len(reference.class_vectors)
    if known != classes or not np.array_equal(reference.class_index, class_index):
        raise UsageError(
            f"the reference was evaluated with other zero-shot classes ({known} there, {classes} here)",
            hint="evaluate both with the same --classes",
        )


def _class_vectors(
    embedder: Embedder, asked: Asked, batch: int, progress: Progress | None
) -> NDArray[np.float32] | None:
    if asked.zero_shot is None:
        return None
    prompts = [prompt for of_class in asked.zero_shot.prompts() for prompt in of_class]
    return class_vectors(embed_texts(embedder, prompts, batch, progress), len(asked.zero_shot.labels))


def _differences(after: Results, before: Results, seed: int) -> Comparison:
    return {
        task: {m: value.difference(before[task][m], seed) for m, value in values.items() if m in before[task]}
        for task, values in after.items()
        if task in before and not is_relative(task)
    }


def _health(scene: Scene) -> list[Finding]:
    if scene.embedded is None:
        return []
    found = health(scene.embedded.media, scene.embedded.images)
    if scene.embedded.texts:
        found += health("text", scene.embedded.text_vectors)
    if scene.class_vectors is not None:
        found += health("class prompt", scene.class_vectors)
    return found


def _cut(model: Model, embedded: Embeddings | None) -> list[Finding]:
    """What was not read cannot be found: texts beyond the model's limit lose their end without a trace in any metric."""
    if embedded is None or not isinstance(model, CutsTexts):
        return []
    count, limit = model.cut_texts(embedded.texts)
    if not count:
        return []
    total = len(embedded.texts)
    return [Finding("note", f"{count} of {total} texts are longer than the model takes and were cut at {limit} tokens")]


def _leaks(seen: Sequence[Control]) -> list[Finding]:
    return [
        Finding(
            "bad", f"LEAK: the {c.name} control of {c.task} {c.metric} scores {c.estimate}, it may score {c.chance:.3f}"
        )
        for c in seen
        if c.leaks and c.chance is not None
    ]


def _difference(differences: Comparison, task: str, metric: str) -> dict[str, Any]:
    found = differences.get(task, {}).get(metric)
    return {"difference": found.to_json()} if found else {}
