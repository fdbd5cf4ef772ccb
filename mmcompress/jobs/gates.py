"""The gates of a recipe: what must hold of the result."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmcompress.errors import UsageError, closest
from mmcompress.evaluate.evaluation import compare
from mmcompress.evaluate.verdict import Facts
from mmcompress.jobs.speed import BEST, TowerSpeed
from mmcompress.recipe import Gates


@dataclass(frozen=True)
class GateResult:
    """One gate, its limit and what was measured."""

    name: str
    passed: bool
    measured: float
    limit: float
    text: str


def require_measurable(gates: Gates, metrics: Collection[str], *, timed: bool, weighed: bool) -> None:
    """Raise UsageError for a gate on something that is not measured: `metrics` are "task.metric", and speed and size."""
    for name in gates.max_drop:
        if not metrics:
            raise UsageError(
                f"gates.max_drop names '{name}', but accuracy is not measured",
                hint="give --eval-data or data.evaluation",
            )
        if name not in metrics:
            raise UsageError(f"gates.max_drop names '{name}', which is not measured", hint=closest(name, metrics))
    if gates.min_speedup and not timed:
        raise UsageError("gates.min_speedup is set, but nothing is timed", hint="add export: {to: onnx}")
    if gates.max_size and not weighed:
        raise UsageError(
            "gates.max_size is set, but the original's size is not known", hint="start from a checkpoint on disk"
        )


def judge(gates: Gates, facts: Facts, speeds: Sequence[TowerSpeed]) -> tuple[GateResult, ...]:
    """Return the result of every gate that is set.

    A drop is judged by its point estimate: the interval says how sure that is and stands in the text. Raises UsageError for a
    gate on something that was not measured.
    """
    results = []
    differences = compare(facts.original, facts.compressed) if facts.original and facts.compressed else {}
    known = {f"{task}.{metric}": value for task, by in differences.items() for metric, value in by.items()}
    require_measurable(gates, known, timed=bool(speeds), weighed=bool(facts.bytes_before and facts.bytes_after))
    for name, limit in gates.max_drop.items():
        drop = -known[name].value
        results.append(
            GateResult(
                name,
                drop <= limit,
                drop,
                limit,
                f"{name} dropped by {drop:.4f} (difference {known[name]}); limit {limit}",
            )
        )
    if gates.min_speedup:
        # Each side in its best runner, where several were timed.
        fair = [s for s in speeds if s.against == "the original"]
        fair = [s for s in fair if s.runner.startswith(BEST)] or fair
        slowest = min(fair, key=lambda speed: speed.ratio.value)
        results.append(
            GateResult(
                "speedup",
                slowest.ratio.value >= gates.min_speedup,
                slowest.ratio.value,
                gates.min_speedup,
                f"{slowest.what}: ×{slowest.ratio}; at least ×{gates.min_speedup} is asked for",
            )
        )
    if gates.max_size and facts.bytes_before and facts.bytes_after:
        share = facts.bytes_after / facts.bytes_before
        results.append(
            GateResult(
                "size", share <= gates.max_size, share, gates.max_size,
                f"size is {share:.3f} of the original's; at most {gates.max_size} is asked for",
            )
        )  # fmt: skip
    return tuple(results)
