"""`mmc check`: is a run worse than a baseline, by more than noise? Accuracy, latency and size, each a case that passes or fails.

Accuracy is compared sample by sample. Latency is compared through ratios to the same original where both sides have them, because
two runs on two days share no machine state; absolute times are compared only on the same processor with as many threads.
What the baseline has and the run lacks is an error, never a pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmcompress import manifest as manifests
from mmcompress.errors import UsageError
from mmcompress.evaluate.evaluation import Evaluation, compare
from mmcompress.evaluate.store import read_evaluation
from mmcompress.evaluate.tasks import TASKS, is_relative
from mmcompress.ops.statistics import Estimate

Kind = Literal["accuracy", "latency", "size"]


@dataclass(frozen=True)
class Limits:
    """What is still accepted."""

    max_drop: float = 0.0
    """Points of accuracy (hundredths), where the drop is also beyond its interval."""
    max_slowdown: float = 0.05
    """Share of the baseline's latency, where the slowdown is also beyond its interval."""
    max_growth: float = 0.01
    """Share of the baseline's bytes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(
                    f"--{name.replace('_', '-')} is {value:g}; expected 0 or more", hint="0 accepts nothing worse"
                )


@dataclass(frozen=True)
class Case:
    """One comparison."""

    kind: Kind
    name: str
    passed: bool
    text: str
    value: float
    """Points lost, slowdown or growth as a share; positive is worse."""
    limit: float


@dataclass
class Side:
    """What was measured about a run or a baseline."""

    label: str
    evaluation: Evaluation | None = None
    speedups: dict[str, Estimate] = field(default_factory=dict)
    """Times faster than the original, by what was timed."""
    latencies: dict[str, Estimate] = field(default_factory=dict)
    """Milliseconds, by what was timed."""
    bytes: dict[str, int] = field(default_factory=dict)
    machine: tuple[Any, ...] = ()
    """What must be the same for absolute times to be compared."""


@dataclass(frozen=True)
class Checked:
    """The outcome, worst first."""

    run: str
    baseline: str
    limits: Limits
    cases: tuple[Case, ...]

    @property
    def failed(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if not case.passed)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "check",
            "passed": not self.failed,
            "run": self.run,
            "baseline": self.baseline,
            "limits": asdict(self.limits),
            "cases": [asdict(case) for case in self.cases],
        }


def check(run: str | Path, baseline: str | Path, limits: Limits | None = None, seed: int = 0) -> Checked:
    """Compare what was measured about `run` and `baseline`: outputs of mmc compress, .npz evaluations or saved benches.

    Raises UsageError for something unreadable, for runs that saw different samples, and for a measurement of the baseline
    that the run lacks.
    """
    limits = limits or Limits()
    before, after = read_side(Path(baseline)), read_side(Path(run))
    cases = [
        *_accuracy(before, after, limits, seed),
        *_latency(before, after, limits),
        *_size(before, after, limits),
    ]
    if not cases:
        raise UsageError(
            f"{before.label} holds no measurement to compare with",
            hint="compress with --eval-data, or give files of mmc eval --save or mmc bench --save",
        )
    cases.sort(key=lambda case: (case.passed, ("accuracy", "latency", "size").index(case.kind), -case.value))
    return Checked(after.label, before.label, limits, tuple(cases))


def read_side(path: Path) -> Side:
    """Read one side. Raises UsageError when `path` is none of the three kinds or is damaged."""
    if path.is_dir():
        return _read_output(path)
    if not path.exists():
        raise UsageError(f"there is no {path}", hint="give an output of mmc compress, a .npz or a bench JSON")
    if path.suffix == ".npz":
        return Side(path.name, evaluation=read_evaluation(path))
    if path.suffix == ".json":
        return _read_bench(path)
    raise UsageError(f"{path} is neither a directory nor .npz nor .json", hint="mmc check --help lists what it takes")


def _read_output(directory: Path) -> Side:
    manifest = manifests.read(directory)
    if manifest is None:
        raise UsageError(f"{directory} has no {manifests.FILE_NAME}", hint="give an output of mmc compress")
    measured, label = manifest.measured, directory.name
    if not measured:
        raise UsageError(f"{directory} was not measured", hint="compress with --eval-data or with an export section")
    side = Side(label, evaluation=final_evaluation(directory))
    try:
        for speed in measured.get("speeds", []):
            key = f"{speed['tower']}, batch {speed['batch']}, {speed['threads']} threads, {speed['runner']}"
            side.speedups[_same_best(key)] = Estimate.from_json(speed["ratio"])
        size = measured.get("bytes", {}).get("compressed")
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{directory / manifests.FILE_NAME} is damaged: {error}", hint="compress again") from error
    if size:
        side.bytes["weights"] = int(size)
    return side


def final_evaluation(directory: Path) -> Evaluation | None:
    """Return the evaluation of the last step of an output, None where nothing was evaluated."""
    made = [file for file in sorted((directory / "reports").glob("*.npz")) if not file.stem.endswith("-random")]
    return read_evaluation(made[-1]) if made else None


def _read_bench(path: Path) -> Side:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["kind"] != "bench":
            raise UsageError(f"{path} is a {document['kind']} document", hint="give what mmc bench --save wrote")
        names = [target["name"] for target in document["targets"]]
        position = {name: f"#{index + 1}" for index, name in enumerate(names)}
        side = Side(path.name, machine=(document["machine"]["cpu"], document["machine"]["threads"]))
        for row in document["results"]:
            key = f"{position[row['target']]} {row['tower']}, batch {row['batch']}, {row['runner']}"
            side.latencies[key] = Estimate.from_json(row["p50_ms"])
        for row in document["ratios"]:
            key = f"{position[row['target']]} {row['tower']}, batch {row['batch']}, {row['runner']}"
            side.speedups[_same_best(key)] = Estimate.from_json(row["ratio"])
        side.bytes = {position[target["name"]]: int(target["bytes"]) for target in document["targets"]}
        return side
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a bench document: {error}", hint="give what mmc bench --save wrote") from error


def _same_best(key: str) -> str:
    """ "best of each: X against Y" is one comparison, whichever runners won."""
    return key.partition("best of each")[0] + "best of each" if "best of each" in key else key


def _accuracy(before: Side, after: Side, limits: Limits, seed: int) -> Iterator[Case]:
    if before.evaluation is None:
        return
    if after.evaluation is None:
        raise UsageError(
            f"{after.label} was not evaluated, and {before.label} was", hint="evaluate it on the same data"
        )
    differences = compare(before.evaluation, after.evaluation, seed)
    for task, by_metric in before.evaluation.estimates.items():
        for metric in by_metric:
            # Agreement is itself a comparison, each side with its own original. Of a task that is not ours (lm-eval's) every metric
            # counts: which are its headlines is not known.
            if is_relative(task) or (task in TASKS and metric not in TASKS[task].headlines):
                continue
            found = differences.get(task, {}).get(metric)
            if found is None:
                raise UsageError(
                    f"{after.label} has no {task} {metric}, and {before.label} has",
                    hint="evaluate both with the same tasks",
                )
            lost = -100 * found.value
            beyond = found.high < 0
            text = (
                f"{task} {metric} {by_metric[metric].value:.4f} → {after.evaluation.estimates[task][metric].value:.4f}, "
                f"{100 * found.value:+.2f} points [{100 * found.low:+.2f}, {100 * found.high:+.2f}] n={found.n}"
            )
            yield Case(
                "accuracy", f"{task}.{metric}", not (beyond and lost > limits.max_drop), text, lost, limits.max_drop
            )


def _latency(before: Side, after: Side, limits: Limits) -> Iterator[Case]:
    through_ratios = bool(before.speedups)
    old, new = (before.speedups, after.speedups) if through_ratios else (before.latencies, after.latencies)
    if not old:
        return
    _require(old, new, before, after, "timed")
    if not through_ratios and before.machine != after.machine:
        raise UsageError(
            f"{before.label} and {after.label} were timed on different machines: {before.machine} and {after.machine}",
            hint="time the original in both runs (mmc bench ORIGINAL OUT), so that ratios can be compared",
        )
    for name, earlier in old.items():
        # A smaller speed-up is a slowdown, and so is a larger latency.
        slowdown = _quotient(earlier, new[name]) if through_ratios else _quotient(new[name], earlier)
        unit = "x" if through_ratios else " ms"
        text = (
            f"{name}: {earlier.value:.2f}{unit} → {new[name].value:.2f}{unit}, "
            f"takes {slowdown.value:.2f} times as long [{slowdown.low:.2f}, {slowdown.high:.2f}]"
        )
        worse = slowdown.low > 1 and slowdown.value - 1 > limits.max_slowdown
        yield Case("latency", name, not worse, text, slowdown.value - 1, limits.max_slowdown)


def _size(before: Side, after: Side, limits: Limits) -> Iterator[Case]:
    _require(before.bytes, after.bytes, before, after, "weighed")
    for name, old in before.bytes.items():
        new = after.bytes[name]
        growth = new / old - 1
        text = f"{name}: {old / 2**20:.2f} → {new / 2**20:.2f} MiB, {100 * growth:+.1f}%"
        yield Case("size", f"{name} bytes", growth <= limits.max_growth, text, growth, limits.max_growth)


def _require(old: Mapping[str, Any], new: Mapping[str, Any], before: Side, after: Side, what: str) -> None:
    missing = sorted(old.keys() - new.keys())
    if missing:
        raise UsageError(
            f"{missing[0]} was {what} for {before.label} and not for {after.label}"
            + (f", and so were {len(missing) - 1} more" if len(missing) > 1 else ""),
            hint="measure both the same way",
        )


def _quotient(above: Estimate, below: Estimate) -> Estimate:
    """Return above / below of two independent positive estimates.

    Their intervals are added in quadrature on the log scale, which is exact where both are lognormal.
    """
    value = above.value / below.value
    if min(above.low, below.low) <= 0 or not math.isfinite(above.high + below.high):
        return Estimate(value, 0.0, math.inf, min(above.n, below.n))
    down = math.hypot(math.log(above.value / above.low), math.log(below.high / below.value))
    up = math.hypot(math.log(above.high / above.value), math.log(below.value / below.low))
    return Estimate(value, value * math.exp(-down), value * math.exp(up), min(above.n, below.n))
