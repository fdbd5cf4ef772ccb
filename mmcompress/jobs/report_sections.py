"""The parts of the report, each from what a run recorded; a part with nothing to say is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmcompress.evaluate.tasks import TASKS
from mmcompress.jobs.report_answers import changed_answers, controls
from mmcompress.jobs.report_gallery import GALLERY_NOTE, gallery
from mmcompress.jobs.report_html import Markup, breakable, join, section, table, tag
from mmcompress.jobs.report_lineage import fact, lineage, machine, reproduce
from mmcompress.jobs.report_points import MIB, favourite, headline_speeds, total_macs
from mmcompress.jobs.report_sensitivity import NOTE as SENSITIVITY_NOTE
from mmcompress.jobs.report_sensitivity import sensitivity
from mmcompress.ops.statistics import Estimate

if TYPE_CHECKING:
    from mmcompress.jobs.report import Run

HEADLINES = {f"{task.name}.{metric}" for task in TASKS.values() for metric in task.headlines}


def heading(runs: Sequence[Run]) -> Markup:
    """What this is about."""
    passes = "; ".join(
        f"{run.name}: " + " → ".join([run.manifest.source.id, *(record.name for record in run.manifest.records)])
        for run in runs
    )
    return join([tag("h1", "What compression did, and what it cost"), tag("p", passes, class_="dim")])


def verdicts(runs: Sequence[Run]) -> Markup:
    """What a reader must know, before anything else."""
    return join(section(_title(run, runs, "verdict"), verdict(run), cards(run)) for run in runs)


def evidence(run: Run, runs: Sequence[Run]) -> Markup:
    """Everything about one run that the verdict rests on."""
    return join(
        [
            section(_title(run, runs, "steps"), steps(run), note=STEPS_NOTE),
            section(
                _title(run, runs, "accuracy"),
                accuracy(run),
                slices(run),
                controls(run),
                changed_answers(run),
                note="Differences are paired, sample by sample.",
            ),
            section(_title(run, runs, "components"), components(run), speeds(run)),
            section(_title(run, runs, "what became of patches"), gallery(run), note=GALLERY_NOTE),
            section(_title(run, runs, "what quantization costs where"), sensitivity(run), note=SENSITIVITY_NOTE),
            section(_title(run, runs, "exported files against torch"), parity(run)),
            section(_title(run, runs, "gates"), gates(run)),
            section(_title(run, runs, "lineage"), lineage(run)),
            section(_title(run, runs, "machine"), machine(run)),
            section(_title(run, runs, "make it again"), reproduce(run)),
        ]
    )


STEPS_NOTE = "Rows marked (random) removed as much, chosen at random, from the same starting point."


def _title(run: Run, runs: Sequence[Run], what: str) -> str:
    """Titles name their run where there are several."""
    return f"{run.name}: {what}" if len(runs) > 1 else what[:1].upper() + what[1:]


def verdict(run: Run) -> Markup:
    """The findings, the worst first as they were recorded."""
    findings = run.measured.get("verdict", [])
    if not findings:
        findings = [{"level": "note", "text": "nothing was measured: compress with --eval-data to know what it cost"}]
    return tag(
        "ul",
        *(tag("li", tag("b", found["level"]), " ", found["text"], class_=found["level"]) for found in findings),
        class_="verdict",
    )


def cards(run: Run) -> Markup:
    """Size, multiply-accumulates, speed and the first metric at a glance."""
    shown: list[tuple[str, str, str]] = []
    size = run.measured.get("bytes", {})
    if size.get("original") and size.get("compressed"):
        shown.append(("size of the weights", f"÷ {size['original'] / size['compressed']:.2f}",
                      f"{size['original'] / MIB:.1f} → {size['compressed'] / MIB:.1f} MiB"))  # fmt: skip
    costs = [total_macs(row) for row in run.stages if "towers" in row]
    if len(costs) > 1 and costs[-1]:
        shown.append(("multiply-accumulates", f"÷ {costs[0] / costs[-1]:.2f}",
                      f"{costs[0] / 1e6:,.0f} → {costs[-1] / 1e6:,.0f} million"))  # fmt: skip
    for speed in headline_speeds(run):
        shown.append((f"{speed['tower']} latency", f"÷ {speed['ratio']['value']:.2f}",
                      f"{speed['before_ms']:.2f} → {speed['after_ms']:.2f} ms"))  # fmt: skip
    name = favourite([run])
    values = [row["metrics"][name] for row in run.stages if name in row.get("metrics", {})]
    if len(values) > 1:
        shown.append((name, f"{values[-1]['value']:.3f}", f"was {values[0]['value']:.3f}"))
    return tag("div", *(tag("div", label, tag("b", big), tag("span", small, class_="dim"), class_="card")
                        for label, big, small in shown), class_="cards")  # fmt: skip


def steps(run: Run) -> Markup:
    """What each step left: parameters, work, bytes, the metrics of interest."""
    rows = run.measured.get("stages", [])
    if not rows:
        return Markup("")
    towers = list(rows[0].get("towers", {}))
    names = sorted({name for row in rows for name in row.get("metrics", {}) if name in HEADLINES})
    made = []
    for row in rows:
        known = "towers" in row
        made.append(
            [
                row["stage"],
                f"{row['parameters']:,}" if known else "",
                *(f"{row['towers'][tower]['macs'] / 1e6:,.1f}" if known else "" for tower in towers),
                f"{row['bytes'] / MIB:,.1f}" if known else "",
                *(_estimate(row.get("metrics", {}).get(name)) for name in names),
            ]
        )
    return table(
        ["stage", "parameters", *(f"{tower} MMACs" for tower in towers), "MiB in memory", *map(breakable, names)], made
    )


def accuracy(run: Run) -> Markup:
    """Every metric of the original and the result, with the paired difference where the samples were kept."""
    metrics = run.measured.get("metrics", {})
    rows = [
        [name, row["original"], row["compressed"], _points_of(run.differences.get(name))]
        for name, row in sorted(metrics.items())
    ]
    return table(["metric", "original", "compressed", "difference, points"], rows) if rows else Markup("")


def slices(run: Run) -> Markup:
    """The slices that lost most: averages hide damage."""
    found = [part for part in run.compressed.slices if part.difference] if run.compressed else []
    if not found:
        return Markup("")
    found.sort(key=lambda part: part.difference.value if part.difference else 0.0)
    rows = [[p.part, f"{p.task}.{p.metric}", str(p.estimate), _points_of(p.difference)] for p in found]
    columns = ["slice", "metric", "compressed", "difference, points"]
    more = tag("details", tag("summary", f"{len(rows) - SHOWN} more"), table(columns, rows[SHOWN:], left=2))
    return join(
        [
            tag("h3", "Slices, those that lost most first"),
            table(columns, rows[:SHOWN], left=2),
            more if len(rows) > SHOWN else "",
        ]
    )


SHOWN = 12


def components(run: Run) -> Markup:
    """Each tower before and after."""
    rows = [row for row in run.stages if "towers" in row]
    if len(rows) < 2:
        return Markup("")
    first, last = rows[0]["towers"], rows[-1]["towers"]
    made = [
        [tower, *(_change(first[tower][key] / unit, last[tower][key] / unit, digits) for key, unit, digits in COSTS)]
        for tower in first
        if tower in last
    ]
    return table(["tower", "parameters", "MiB in memory", "MMACs"], made)


COSTS = (("parameters", 1, 0), ("bytes", MIB, 1), ("macs", 1e6, 1))


def speeds(run: Run) -> Markup:
    """Latency of the exported files, both sides timed in turn."""
    rows = [
        [
            speed["tower"], speed["runner"], f"{speed['batch']}", f"{speed['threads']}", f"{speed['before_ms']:.2f}",
            f"{speed['after_ms']:.2f}", _estimate(speed["ratio"], 2),
        ]
        for speed in run.measured.get("speeds", [])
    ]  # fmt: skip
    columns = ["tower", "runner", "batch", "threads", "original ms", "compressed ms", "times faster [95%]"]
    return table(columns, rows, left=2) if rows else Markup("")


def parity(run: Run) -> Markup:
    """How far the exported graphs are from torch, at every shape they were compared at."""
    if run.artifact is None:
        return Markup("")
    rows = [
        [
            part.name, "as it runs" if row.get("rounding", True) else "without rounding", str(row["batch"]),
            str(row["tokens"] or "-"), f"{row['max_abs']:.1e}", f"{row['relative']:.1e}", f"{row['cosine']:.6f}",
        ]
        for part in run.artifact.components
        for row in part.parity
    ]  # fmt: skip
    files = [
        [part.name, part.file, f"{part.bytes / MIB:.2f}", fact({kind: f"{size / MIB:.2f}" for kind, size in part.weights.items()}),
         str(sum(part.nodes.values()))]
        for part in run.artifact.components
    ]  # fmt: skip
    columns = ["tower", "compared", "batch", "tokens", "largest difference", "relative", "cosine"]
    return join(
        [
            tag("p", f"{run.artifact.format}, {run.artifact.precision}, opset {run.artifact.opset}"),
            table(["tower", "file", "MiB", "weights by type, MiB", "nodes"], files, left=2),
            table(columns, rows, left=2) if rows else "",
        ]
    )


def gates(run: Run) -> Markup:
    """What was demanded, and what was found."""
    rows = [["pass" if gate["passed"] else "FAIL", gate["text"]] for gate in run.measured.get("gates", [])]
    return table(["", "gate"], rows, left=2) if rows else Markup("")


def _estimate(found: dict[str, Any] | None, digits: int = 3) -> str:
    if found is None:
        return ""
    estimate = Estimate.from_json(found)
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _points_of(difference: Estimate | None) -> str:
    if difference is None:
        return ""
    value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _change(before: float, after: float, digits: int) -> str:
    share = f" ({after / before:.2f})" if before else ""
    return f"{before:,.{digits}f} → {after:,.{digits}f}{share}"
