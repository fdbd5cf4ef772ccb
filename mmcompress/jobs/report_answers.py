"""What a report shows of models that answer in text: answers that changed, and what is scored without looking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcompress.evaluate.controls import Control
from mmcompress.jobs.report_html import Markup, table, tag
from mmcompress.ops.statistics import Estimate

if TYPE_CHECKING:
    from mmcompress.jobs.report import Run

SHOWN = 12
"""Answers at most."""


def changed_answers(run: Run) -> Markup:
    """The first samples that the compressed model answers otherwise, with what the data says; letter by letter."""
    before, after = (side.scene.answered if side else None for side in (run.original, run.compressed))
    if before is None or after is None or run.compressed is None:
        return Markup("")
    keys = run.compressed.scene.keys
    accepted = after.references or tuple(() for _ in keys)
    rows = [
        [key, " / ".join(dict.fromkeys(texts)), was, now]
        for key, texts, was, now in zip(keys, accepted, before.texts, after.texts, strict=True)
        if was.strip() != now.strip()
    ]
    if not rows:
        return tag("p", f"All {len(keys)} answers are those of the original, letter by letter.")
    return Markup(
        tag("h3", f"Answers that changed: {len(rows)} of {len(keys)}")
        + table(["sample", "right", "original", "compressed"], rows[:SHOWN], left=4)
    )


def controls(run: Run) -> Markup:
    """What the compressed model, and an answer without looking, score."""
    found = run.compressed.controls if run.compressed else ()
    if not found:
        return Markup("")
    earlier = {_name(control): control.estimate for control in run.original.controls} if run.original else {}
    rows: list[list[Any]] = [
        [
            control.name,
            f"{control.task}.{control.metric}",
            str(earlier.get(_name(control), "")),
            str(control.estimate),
            _lost(control.lost),
        ]
        for control in found
    ]
    columns = ["control", "metric", "original", "compressed", "lost by it, points"]
    return Markup(tag("h3", "Controls: what is scored without looking") + table(columns, rows, left=2))


def _name(control: Control) -> tuple[str, str, str]:
    return control.name, control.task, control.metric


def _lost(found: Estimate | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
