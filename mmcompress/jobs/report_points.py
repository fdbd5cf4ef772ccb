"""What the report's plots show: each stage of each run as a point, from its recorded rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmcompress.jobs.report_html import Markup, section, tag
from mmcompress.jobs.report_plots import Kind, Point, pareto_plot
from mmcompress.ops.statistics import Estimate

if TYPE_CHECKING:
    from mmcompress.jobs.report import Run

MIB = 2**20
FAVOURITES = (
    "retrieval.image_to_text_r1",
    "retrieval.audio_to_text_r1",
    "zero-shot.top1",
    "retrieval.text_to_image_r1",
    "retrieval.text_to_audio_r1",
    "transcription.word_accuracy",
    "vqa.accuracy",
    "captioning.cider",
)
"""Metrics for the plots, the first that was measured."""


def plots(runs: Sequence[Run]) -> Markup:
    """Accuracy by multiply-accumulates, by bytes and by latency."""
    name = favourite(runs)
    if not name:
        return Markup("")
    figures = [
        pareto_plot(
            "Accuracy by work", "million multiply-accumulates, all towers", name, list(_points(runs, name, "macs"))
        ),
        pareto_plot("Accuracy by size", "MiB in memory", name, list(_points(runs, name, "bytes"))),
        pareto_plot("Accuracy by latency", _latency_axis(runs), name, list(_latency_points(runs, name))),
    ]
    note = (
        "Left and up is better. Whiskers are 95% intervals of each point alone; paired differences below are sharper. "
        "The dashed line joins what nothing else beats. Hollow: random selection, at the cost of the step it stands beside. "
        "Points of the same cost are drawn side by side."
    )
    return section("Accuracy against cost", tag("div", *figures, class_="plots") if any(figures) else "", note=note)


def favourite(runs: Sequence[Run]) -> str:
    """The metric that is plotted: the best known one that every run measured; empty without one."""
    common = set.intersection(*({name for row in run.stages[:1] for name in row.get("metrics", {})} for run in runs))
    known = [name for name in FAVOURITES if name in common]
    return known[0] if known else min(common, default="")


def headline_speeds(run: Run) -> list[dict[str, Any]]:
    """Per tower the comparison of each side's best runner, or the only one there is."""
    chosen: dict[str, dict[str, Any]] = {}
    for speed in run.measured.get("speeds", []):
        if speed["tower"] not in chosen or speed["runner"].startswith("best of each"):
            chosen[speed["tower"]] = speed
    return list(chosen.values())


def total_macs(row: dict[str, Any]) -> int:
    """Multiply-accumulates of one image and one text."""
    return int(sum(tower["macs"] for tower in row["towers"].values()))


def _points(runs: Sequence[Run], name: str, cost: str) -> Iterator[Point]:
    """Every stage of one run; of several runs only where each started and ended, or nobody could read the labels."""
    several = len(runs) > 1
    originals: set[tuple[float, float]] = set()
    for number, run in enumerate(runs):
        rows = [(run.stages[0], "original"), (run.stages[-1], run.name)] if several else _named(run)
        x = 0.0
        for row, label in rows:
            if "towers" in row:
                x = total_macs(row) / 1e6 if cost == "macs" else row["bytes"] / MIB
            if name not in row.get("metrics", {}):
                continue
            found = Estimate.from_json(row["metrics"][name])
            kind: Kind = "random" if row.get("control") else "original" if row is run.stages[0] else "step"
            if kind == "original" and (x, found.value) in originals:
                continue
            originals.add((x, found.value))
            yield Point(label, x, found.value, found.low, found.high, kind, number)


def _named(run: Run) -> list[tuple[dict[str, Any], str]]:
    return [(row, row["stage"]) for row in run.measured.get("stages", [])]


def _latency_points(runs: Sequence[Run], name: str) -> Iterator[Point]:
    for number, run in enumerate(runs):
        found = [Estimate.from_json(row["metrics"][name]) for row in run.stages if name in row.get("metrics", {})]
        slowest = _slowest(run)
        if slowest is None or len(found) < 2:
            continue
        labels = (f"original of {run.name}", run.name) if len(runs) > 1 else ("original", "compressed")
        kinds: tuple[Kind, Kind] = ("original", "step")
        for kind, label, x, value in zip(
            kinds,
            labels,
            (slowest["before_ms"], slowest["after_ms"]),
            (found[0], found[-1]),
            strict=True,
        ):
            yield Point(label, x, value.value, value.low, value.high, kind, number)


def _slowest(run: Run) -> dict[str, Any] | None:
    return max(headline_speeds(run), key=lambda speed: speed["before_ms"], default=None)


def _latency_axis(runs: Sequence[Run]) -> str:
    found = [speed for run in runs if (speed := _slowest(run))]
    return f"ms per batch of {found[0]['batch']}, {found[0]['tower']}, each one's best runner" if found else "ms"
