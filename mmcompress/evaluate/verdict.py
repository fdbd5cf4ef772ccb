"""The honest verdict: from measured facts to sentences, the worst first, each with its n and interval.

Pure functions. What was not measured is said to be missing rather than passed over; a difference whose interval holds zero
is never called a gain or "no loss", but by what it cannot exclude.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

from mmcompress.evaluate.controls import BLIND
from mmcompress.evaluate.evaluation import Evaluation, compare, same_samples
from mmcompress.evaluate.findings import Finding, Level
from mmcompress.evaluate.scene import Measured
from mmcompress.evaluate.tasks import TASKS
from mmcompress.ops.statistics import Estimate

LEVELS: dict[Level, int] = {"bad": 0, "note": 1, "good": 2}
MIB = 2**20
AGREEMENTS = (
    ("agreement", "top1", "names the same nearest text"),
    ("answer-agreement", "identical", "gives the same answer"),
)


@dataclass(frozen=True)
class Speed:
    """How many times faster the compressed model is than something: above 1 faster, below 1 slower."""

    what: str
    """What was timed, such as "vision, batch 1, onnxruntime cpu"."""
    ratio: Estimate
    """Latency of the other, divided by that of the compressed model."""
    against: str = "the original"
    """Such as "the original" or "the original in bf16"."""


@dataclass(frozen=True)
class Facts:
    """Everything measured about one compression; what is missing stays None or empty."""

    compressed: Evaluation | None = None
    original: Evaluation | None = None
    random: Sequence[Evaluation] = ()
    """Controls that removed as much, chosen at random; several seeds are averaged sample by sample."""
    sibling: Evaluation | None = None
    """A smaller model the user could take instead."""
    sibling_name: str = "the smaller sibling"
    speeds: Sequence[Speed] = ()
    bytes_before: int | None = None
    bytes_after: int | None = None
    random_expected: bool = True
    """Whether something was selected at all: quantization alone has no random counterpart."""
    tolerated: Mapping[str, float] = field(default_factory=dict)
    """Loss the user accepts, as a share, by "task.metric" ("retrieval.image_to_text_r1": 0.02)."""


@dataclass(frozen=True)
class _Weighed:
    """A finding with its place among those of its level: lower comes first."""

    order: int
    size: float
    finding: Finding


def verdict(facts: Facts, seed: int = 0) -> list[Finding]:
    """Return the findings, the worst first. Raises UsageError when evaluations were made on different samples."""
    return _worst_first([*_broken(facts), *_speed(facts), *_accuracy(facts, seed), *_size(facts)])


def random_findings(random: Sequence[Evaluation], compressed: Evaluation, seed: int = 0) -> list[Finding]:
    """Return only how `compressed` compares with random selections at the same ratio, the worst first.

    For a single step of a longer sequence. Raises UsageError when evaluations were made on different samples.
    """
    return _worst_first(_against_random(random, compressed, seed))


def _worst_first(found: Iterable[_Weighed]) -> list[Finding]:
    placed = sorted(found, key=lambda item: (LEVELS[item.finding.level], item.order, -item.size))
    return [item.finding for item in placed]


def _broken(facts: Facts) -> Iterator[_Weighed]:
    for finding in facts.compressed.findings if facts.compressed else ():
        yield _Weighed(0, 0, finding)
    said = facts.compressed.findings if facts.compressed else ()
    for finding in facts.original.findings if facts.original else ():
        if finding.level == "note" and finding in said:  # about the data, not about either model
            continue
        yield _Weighed(1, 0, Finding(finding.level, f"in the original: {finding.text}"))


def _speed(facts: Facts) -> Iterator[_Weighed]:
    if not facts.speeds:
        yield _Weighed(9, 1, Finding("note", "speed was not measured"))
    for speed in facts.speeds:
        ratio = speed.ratio
        shown = f"×{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] n={ratio.n}"
        if ratio.high < 1:
            text = f"SLOWER than {speed.against}: {speed.what}, speed {shown}"
            yield _Weighed(2, 1 / ratio.value, Finding("bad", text))
        elif ratio.low > 1:
            text = f"faster than {speed.against}: {speed.what}, speed {shown}"
            yield _Weighed(2, ratio.value, Finding("good", text))
        else:
            text = f"not measurably faster than {speed.against}: {speed.what}, speed {shown}"
            yield _Weighed(2, 0, Finding("note", text))


def _accuracy(facts: Facts, seed: int) -> Iterator[_Weighed]:
    if facts.compressed is None:
        yield _Weighed(9, 3, Finding("note", "accuracy was not measured"))
        return
    yield from _against_chance(facts.compressed)
    if facts.original is None:
        yield _Weighed(9, 3, Finding("note", "the original was not evaluated, so the loss of accuracy is unknown"))
    else:
        yield from _against_original(facts, facts.original, facts.compressed, seed)
        yield from _slices(facts.original, facts.compressed, seed)
    if facts.random:
        yield from _against_random(facts.random, facts.compressed, seed)
    elif facts.random_expected:
        yield _Weighed(9, 2, Finding("note", "random selection at the same ratio was not evaluated for comparison"))
    for task, metric, words in AGREEMENTS:
        estimate = facts.compressed.estimates.get(task, {}).get(metric)
        if estimate is not None:
            yield _Weighed(8, 0, Finding("note", f"{words} as the original: share {estimate}"))
    if facts.sibling is not None:
        yield from _against_sibling(facts.sibling, facts.sibling_name, facts.compressed, seed)


def _against_chance(compressed: Evaluation) -> Iterator[_Weighed]:
    for task, metric, measured in _headlines(compressed):
        estimate = compressed.estimates[task][metric]
        if TASKS[task].relative or measured.chance is None:
            continue
        # Where one class is common, always naming it beats chance without looking.
        answers = [c.estimate.value for c in compressed.controls if (c.name, c.task, c.metric) == (BLIND, task, metric)]
        bar = max([measured.chance, *answers])
        if not estimate.low > bar:
            text = f"no better than guessing: {task} {metric} {estimate}, without looking {bar:.4f}"
            yield _Weighed(4, 0, Finding("bad", text))


def _against_original(facts: Facts, original: Evaluation, compressed: Evaluation, seed: int) -> Iterator[_Weighed]:
    differences = compare(original, compressed, seed)
    for task, metric, _ in _headlines(compressed):
        difference = differences.get(task, {}).get(metric)
        if difference is None:
            continue
        levels = f"{original.estimates[task][metric].value:.3f} → {compressed.estimates[task][metric].value:.3f}"
        shown = f"{task} {metric} {levels}, {_points(difference)}"
        tolerated = facts.tolerated.get(f"{task}.{metric}")
        if difference.high < 0 and tolerated is not None and difference.value >= -tolerated:
            text = f"accuracy drop within the tolerated {100 * tolerated:.1f} points: {shown}"
            yield _Weighed(5, -difference.value, Finding("note", text))
        elif difference.high < 0:
            yield _Weighed(5, -difference.value, Finding("bad", f"accuracy drop beyond its interval: {shown}"))
        elif difference.low > 0:
            yield _Weighed(5, difference.value, Finding("good", f"accuracy gain: {shown}"))
        else:
            excluded = f"a drop of up to {-100 * difference.low:.1f} points is not excluded"
            yield _Weighed(5, -difference.low, Finding("note", f"no accuracy drop seen: {shown}; {excluded}"))


def _slices(original: Evaluation, compressed: Evaluation, seed: int) -> Iterator[_Weighed]:
    """The slice that most clearly lost more than the whole, allowing for how many were looked at (Bonferroni)."""
    whole = compare(original, compressed, seed)
    looked = [(part, part.difference) for part in compressed.slices if part.difference is not None]
    if not looked:
        return
    needed = NormalDist().inv_cdf(1 - 0.025 / len(looked))
    worst: tuple[float, str] | None = None
    for part, difference in looked:
        usual = whole[part.task][part.metric]
        spread = (difference.high - difference.low) / (2 * NormalDist().inv_cdf(0.975))
        if difference.value < usual.value - needed * spread:
            text = f"damage is concentrated: {part.part}, {part.task} {part.metric} {_points(difference)} "
            text += f"against {_points(usual)} on all (the worst of {len(looked)} slices)"
            # The strongest evidence, not the largest gap: in a small slice chance makes large gaps.
            weight = (usual.value - difference.value) * difference.n**0.5
            worst = max(worst or (0.0, ""), (weight, text))
    if worst is not None:
        yield _Weighed(7, worst[0], Finding("bad", worst[1]))


def _against_random(random: Sequence[Evaluation], compressed: Evaluation, seed: int) -> Iterator[_Weighed]:
    for control in random:
        same_samples(control, compressed.scene.keys)
    for task, metric, measured in _headlines(compressed):
        rivals = [control.results[task][metric] for control in random if metric in control.results.get(task, {})]
        if not rivals:
            continue
        mean = np.mean([rival.values for rival in rivals], axis=0)
        average = replace(measured, values=mean)
        difference = measured.difference(average, seed)
        shown = f"{task} {metric} {measured.mean:.3f} against {average.mean:.3f}, {_points(difference)}"
        shown += f", {len(rivals)} random seed{'s' if len(rivals) > 1 else ''}"
        if difference.high < 0:
            text = f"WORSE than random selection at the same ratio: {shown}"
            yield _Weighed(3, -difference.value, Finding("bad", text))
        elif difference.low > 0:
            text = f"better than random selection at the same ratio: {shown}"
            yield _Weighed(3, difference.value, Finding("good", text))
        else:
            yield _Weighed(3, 0, Finding("bad", f"no better than random selection at the same ratio: {shown}"))


def _against_sibling(sibling: Evaluation, name: str, compressed: Evaluation, seed: int) -> Iterator[_Weighed]:
    for task, by_metric in compare(sibling, compressed, seed).items():
        for metric in TASKS[task].headlines:
            if metric not in by_metric:
                continue
            difference = by_metric[metric]
            better = difference.low > 0
            words = "better than" if better else "no better than"
            text = f"{words} {name}: {task} {metric} {_points(difference)}"
            yield _Weighed(6, abs(difference.value), Finding("good" if better else "bad", text))


def _size(facts: Facts) -> Iterator[_Weighed]:
    before, after = facts.bytes_before, facts.bytes_after
    if not before or not after:
        yield _Weighed(9, 0, Finding("note", "size was not measured"))
        return
    shown = f"{before / MIB:.1f} → {after / MIB:.1f} MiB on disk, exact"
    if round(before / after, 2) == 1:
        yield _Weighed(8, 1, Finding("note", f"as large as the original: {shown}"))
    elif after > before:
        yield _Weighed(8, after / before, Finding("bad", f"LARGER than the original: {shown}"))
    else:
        yield _Weighed(8, 1, Finding("good", f"smaller by a factor of {before / after:.2f}: {shown}"))


def _headlines(evaluation: Evaluation) -> Iterator[tuple[str, str, Measured]]:
    for task, by_metric in evaluation.results.items():
        for metric in TASKS[task].headlines:
            if metric in by_metric:
                yield task, metric, by_metric[metric]


def _points(difference: Estimate) -> str:
    value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}] n={difference.n}"
