"""Accuracy by the share of tokens that is kept: a line for each method, with its intervals, random selection among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmcompress import passes
from mmcompress.jobs.report_html import Markup, join, section, tag
from mmcompress.jobs.report_plots import Box, axes, px, scale
from mmcompress.jobs.report_points import favourite
from mmcompress.manifest import Record
from mmcompress.ops.statistics import Estimate

if TYPE_CHECKING:
    from mmcompress.jobs.report import Run

RANDOM = "random"
WIDTH, HEIGHT = 640, 380
PLOT = Box(58, 14, 500, 336)
APART = 3
"""Pixels between the whiskers of two methods at one share."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3294", "#008080", "#a52a2a")
"""Told apart by most people who do not see all colours (Okabe and Ito), and some more."""
GREY = "#777777"
HOW_MANY = (
    "method", "keep", "keep_tokens", "macs", "latency_ms", "merged", "similarity", "adaptive", "floor", "stride",
)  # fmt: skip
REDUCING = ("merge-tokens", "coarsen-tokens", "reduce-visual-tokens", "drop-visual-tokens", "merge-frames")
NOTE = "Whiskers are 95% intervals. The dashed line is random selection of as many tokens: what is not above it is worth nothing."


@dataclass(frozen=True)
class Curve:
    """What one method scores at several shares."""

    method: str
    scores: dict[float, Estimate]


def curves(
    title: str, y_label: str, found: Sequence[Curve], x_label: str = "share of the tokens that is kept"
) -> Markup:
    """Return a figure of shares from 0 to 1; nothing where no method was measured at two shares."""
    if not any(len(curve.scores) > 1 for curve in found):
        return Markup("")
    scores = [score for curve in found for score in curve.scores.values()]
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    margin = max(high - low, 1e-6) * 0.06
    x = scale(0.0, 1.04, PLOT.left, PLOT.right)
    y = scale(min(low, max(0.0, low - margin)), high + margin, PLOT.bottom, PLOT.top)
    parts = [axes(x, y, x_label, y_label, PLOT)]
    for number, curve in enumerate(found):
        colour = GREY if curve.method == RANDOM else COLOURS[number % len(COLOURS)]
        aside = (number - (len(found) - 1) / 2) * APART
        spots = [(x(share) + (aside if share < 1 else 0), score) for share, score in sorted(curve.scores.items())]
        line = " ".join(f"{px(at)},{px(y(score.value))}" for at, score in spots)
        dashes = "6 4" if curve.method == RANDOM else None
        parts.append(
            tag("polyline", points=line, fill="none", stroke=colour, stroke_width=1.6, stroke_dasharray=dashes)
        )
        for at, score in spots:
            hint = tag("title", f"{curve.method}: {score}")
            whisker = tag("line", x1=px(at), x2=px(at), y1=px(y(score.low)), y2=px(y(score.high)), stroke=colour)
            parts.append(tag("g", hint, whisker, tag("circle", cx=px(at), cy=px(y(score.value)), r=3, fill=colour)))
        top = PLOT.top + 12 + 18 * number
        parts.append(
            tag("line", x1=512, x2=532, y1=top, y2=top, stroke=colour, stroke_width=2, stroke_dasharray=dashes)
        )
        parts.append(tag("text", curve.method, x=538, y=top + 4))
    svg = tag("svg", join(parts), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {y_label}")
    return tag("figure", tag("figcaption", title), svg)


def token_curves(runs: Sequence[Run]) -> Markup:
    """Return the curves of runs that only made tokens fewer, those of one model, data and metric together."""
    name = favourite(runs)
    figures: dict[tuple[str, ...], dict[str, dict[float, Estimate]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        records = run.manifest.records
        rows = [row["metrics"][name] for row in run.measured.get("stages", []) if name in row.get("metrics", {})]
        if len(records) != 1 or records[0].name not in REDUCING or len(rows) < 2:
            continue
        original, reduced, *control = map(Estimate.from_json, rows)
        data = str(run.original.config.get("fingerprint", "")) if run.original else ""
        methods = figures[records[0].name, run.manifest.source.sha256, data]
        for label, score in ((_label(records[0]), reduced), *((RANDOM, score) for score in control)):
            methods[label] |= {1.0: original, float(records[0].facts["keep"]): score}
    made = []
    for (reducing, *_), methods in figures.items():
        if any(len(scores) > 2 for scores in methods.values()):
            found = [Curve(label, scores) for label, scores in methods.items()]
            found.sort(key=lambda curve: curve.method == RANDOM)
            made.append(curves(f"Accuracy by tokens kept: {reducing}", name, found))
    return section("Accuracy by tokens kept", *made, note=NOTE)


def _label(record: Record) -> str:
    """Return the method, and what else was asked for but how many tokens."""
    made = vars(passes.build(record.name, record.params))
    plain = vars(passes.build(record.name, {}))
    more = [f"{key} {value}" for key, value in made.items() if value != plain[key] and key not in HOW_MANY]
    return ", ".join([str(made["method"]), *more])
