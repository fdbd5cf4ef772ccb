"""Which layers suffer from quantization, as a drawing: a line for each group of layers, a dot for each scheme it was judged in.

The further right, the more was lost (a logarithmic axis). A filled dot is the scheme the layers have now; at the end of the line
stands what that saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmcompress.jobs.report_html import Markup, join, table, tag
from mmcompress.jobs.report_plots import COLOURS, LETTER, px
from mmcompress.jobs.report_points import MIB
from mmcompress.jobs.sensitivity import Row, judged_groups

if TYPE_CHECKING:
    from mmcompress.jobs.report import Run

NOTE = (
    "1 - cosine between the embeddings and the unquantized model's, where only these layers were quantized; the worst first. "
    "Filled dots are what the layers have now."
)
WIDTH, LINE, TOP, BOTTOM = 820, 20, 30, 46
RIGHT = 96
"""Pixels for what is saved, right of the dots."""
RADIUS = 5
LONGEST = 44
"""Letters of a name that are shown, its end."""
SHOWN = 40
"""Lines at most: the worst."""
LEAST = 1e-8
"""Losses below are drawn here: they are rounding."""


def sensitivity(run: Run) -> Markup:
    """What quantizing each group of layers alone did, where it was measured: a summary, a drawing and a table for each tower."""
    found = judged_groups(run.manifest.records)
    made: list[Markup] = []
    for record in run.manifest.records:
        for tower, report in record.plan.get("towers", {}).items() if record.name == "quantize" else ():
            mine = [row for row in found if row.tower == tower]
            if not mine:
                continue
            made += [tag("h3", tower), tag("p", _summary(report)), dots(tower, mine), _table(mine)]
    return join(made)


def dots(tower: str, found: Sequence[Row]) -> Markup:
    """Return the drawing of one tower; fewer than two groups give none."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(found, key=lambda row: -row.loss):
        groups.setdefault(row.layers, []).append(row)
    if len(groups) < 2:
        return Markup("")
    schemes = sorted({row.scheme for row in found})
    names = shortened(list(groups))
    shown = list(groups.items())[:SHOWN]
    left = 24 + max(len(names[name]) for name, _ in shown) * LETTER
    bottom = TOP + LINE * len(shown)
    losses = [max(row.loss, LEAST) for _, each in shown for row in each]
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)) + 1e-9)

    def across(loss: float) -> float:
        return left + (math.log10(max(loss, LEAST)) - low) / max(high - low, 1) * (WIDTH - RIGHT - left)

    parts = [_legend(schemes, left)]
    for power in range(low, high + 1):
        x = px(across(10.0**power))
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=bottom, class_="axis"))
        parts.append(tag("text", f"{10.0**power:g}", x=x, y=bottom + 16, text_anchor="middle", class_="dim"))
    parts.append(tag("text", "1 - cosine with only these quantized", x=px((left + WIDTH - RIGHT) / 2), y=bottom + 36,
                     text_anchor="middle"))  # fmt: skip
    parts.append(tag("text", "MiB saved", x=WIDTH - 8, y=TOP - 10, text_anchor="end", class_="dim"))
    for index, (name, each) in enumerate(shown):
        parts.append(_line(names[name], each, schemes, TOP + LINE * (index + 0.5), left, across))
    hidden = len(groups) - len(shown)
    caption = f"{tower}: what each group of layers loses" + (
        f", the worst {len(shown)} of {len(groups)}" if hidden else ""
    )
    svg = tag("svg", join(parts), viewBox=f"0 0 {WIDTH} {bottom + BOTTOM}", role="img", aria_label=caption)
    return tag("figure", tag("figcaption", caption), svg, class_="wide")


def shortened(names: Sequence[str]) -> dict[str, str]:
    """Return names without the modules that all begin with, and without what makes them too long."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return {name: _fitting(part[same:]) for name, part in zip(names, parts, strict=True)}


def _fitting(parts: Sequence[str]) -> str:
    for start in range(len(parts)):
        end = "…" * (start > 0) + ".".join(parts[start:])
        if len(end) <= LONGEST:
            return end
    return "…" + parts[-1][1 - LONGEST :]


def _line(
    name: str, found: Sequence[Row], schemes: Sequence[str], y: float, left: float, across: Callable[[float], float]
) -> Markup:
    """One group: its name, a dot for each scheme, what the chosen one saves."""
    ends = [across(row.loss) for row in found]
    saved = next((row.bytes_saved for row in found if row.chosen), 0)
    parts = [
        tag("text", name, x=px(left - 12), y=px(y + 4), text_anchor="end"),
        tag("line", x1=px(min(ends)), x2=px(max(ends)), y1=px(y), y2=px(y), class_="leader"),
        tag("text", "" if saved is None else f"{saved / MIB:,.2f}" if saved else "float", x=WIDTH - 8, y=px(y + 4),
            text_anchor="end", class_="dim"),
    ]  # fmt: skip
    for row in found:
        hint = tag("title", f"{row.layers}, {row.scheme}: {row.loss:.2e}" + (", chosen" if row.chosen else ""))
        parts.append(tag("g", hint, _dot(across(row.loss), y, schemes.index(row.scheme), row.chosen)))
    return join(parts)


def _dot(x: float, y: float, scheme: int, chosen: bool) -> Markup:
    style = f"run{scheme % COLOURS}" + ("" if chosen else " open")
    return tag("circle", cx=px(x), cy=px(y), r=RADIUS - 0.5, class_=style)


def _legend(schemes: Sequence[str], left: float) -> Markup:
    parts, x = [], left
    for index, scheme in enumerate(schemes):
        parts += [_dot(x + RADIUS, TOP - 14, index, True), tag("text", scheme, x=px(x + 3 * RADIUS), y=TOP - 10)]
        x += 3 * RADIUS + (len(scheme) + 3) * LETTER
    return join(parts)


def _summary(report: dict[str, Any]) -> str:
    everything = (
        f", with every layer quantized {report['cosine_all_quantized']:.4f}" if "cosine_all_quantized" in report else ""
    )
    kept = report.get("kept_float", [])
    counts = ", ".join(f"{count} groups {scheme}" for scheme, count in report.get("schemes", {}).items())
    summary = f"{report['scheme']}{f' ({counts})' if counts else ''}; cosine {report['cosine']:.4f}{everything}"
    return summary + (f"; left in float: {', '.join(kept)}" if kept else "")


def _table(found: Sequence[Row]) -> Markup:
    cells = [
        [
            row.layers, row.scheme, "" if row.bytes_saved is None else f"{row.bytes_saved / MIB:,.3f}", f"{row.loss:.2e}",
            "yes" if row.chosen else "",
        ]
        for row in found
    ]  # fmt: skip
    made = table(["layers", "scheme", "MiB saved", "1 - cosine", "now"], cells, left=2)
    return tag("details", tag("summary", f"{len(found)} measurements as a table"), made)
