"""Accuracy against cost as inline SVG: a point for each stage with its interval, labels written beside the points.

Labels never cover a point, a whisker or one another as long as there is room: each tries places around its point, near ones
first, and takes a line to its point when it had to move away. Points of the same cost stand side by side, so that their
whiskers can be told apart. Text widths are estimated on the wide side, because the font is the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mmcompress.jobs.report_html import Markup, join, tag

Kind = Literal["original", "step", "random"]

WIDTH, HEIGHT = 540, 380
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 44
BESIDE = 9
"""Pixels between points of the same cost."""
LETTER, LINE = 6.7, 15
"""Pixels a letter takes at most on average in a 12 px font, and a line of it."""
RADIUS = 5
COLOURS = 4


Spot = tuple[float, float]
"""Pixels across and down."""


@dataclass(frozen=True)
class Point:
    """One measured model."""

    label: str
    x: float
    y: float
    low: float
    high: float
    kind: Kind
    run: int = 0


@dataclass(frozen=True)
class Box:
    """A rectangle that text may not cover."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Return the area both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across * down if across > 0 and down > 0 else 0.0


PLOT = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


@dataclass(frozen=True)
class Scale:
    """From values to pixels, with round tick marks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Label:
    """Where a point's label went."""

    text: str
    box: Box
    moved: bool
    """Whether a line has to tie it to its point."""
    anchor: Literal["start", "middle", "end"] = "start"
    """The end of the text that is fixed, so that a wrong estimate of its width never runs into the point."""

    def draw(self) -> Markup:
        at = {"start": self.box.left, "middle": (self.box.left + self.box.right) / 2, "end": self.box.right}[
            self.anchor
        ]
        return tag("text", self.text, class_="label", x=px(at), y=px(self.box.bottom - 3.5), text_anchor=self.anchor)


def pareto_plot(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> Markup:
    """Return a figure; fewer than two points, or points that all cost the same, give none."""
    if len({point.x for point in points}) < 2:
        return Markup("")
    x, y = scales(points)
    spots = side_by_side(points, x, y)
    labels = place_labels(points, spots, y)
    drawing = join(
        [
            axes(x, y, x_label, y_label),
            tag("polyline", points=" ".join(f"{px(a)},{px(b)}" for a, b in _stairs(points, spots)), class_="front"),
            *(_leader(spot, label) for spot, label in zip(spots, labels, strict=True) if label.moved),
            *(_mark(point, spot, y) for point, spot in zip(points, spots, strict=True)),
            *(label.draw() for label in labels),
        ]
    )
    svg = tag(
        "svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {y_label} by {x_label}"
    )
    return tag("figure", tag("figcaption", title), svg)


def scales(points: Sequence[Point]) -> tuple[Scale, Scale]:
    """Return the axes: costs from 0, so that lengths are proportional; the metric around its intervals."""
    lows = [point.low if math.isfinite(point.low) else point.y for point in points]
    highs = [point.high if math.isfinite(point.high) else point.y for point in points]
    margin = max(max(highs) - min(lows), 1e-6) * 0.12
    x = scale(0.0, max(point.x for point in points) * 1.06, PLOT.left, PLOT.right)
    # Shares do not go below 0; word accuracy does, where more is made up than was said.
    bottom = min(lows) - margin if min(lows) < 0 else max(0.0, min(lows) - margin)
    return x, scale(bottom, max(highs) + margin, PLOT.bottom, PLOT.top)


def side_by_side(points: Sequence[Point], x: Scale, y: Scale) -> list[Spot]:
    """Return where each point is drawn: at its cost, or beside the others of (nearly) the same cost."""
    order = sorted(range(len(points)), key=lambda index: points[index].x)
    groups: list[list[int]] = []
    for index in order:
        if groups and x(points[index].x) - x(points[groups[-1][0]].x) < BESIDE - 2:
            groups[-1].append(index)
        else:
            groups.append([index])
    spots: dict[int, Spot] = {}
    for group in groups:
        middle = sum(x(points[index].x) for index in group) / len(group)
        for place, index in enumerate(sorted(group)):
            centre = x(points[index].x) if len(group) == 1 else middle + (place - (len(group) - 1) / 2) * BESIDE
            spots[index] = (min(max(centre, PLOT.left), PLOT.right), y(points[index].y))
    return [spots[index] for index in range(len(points))]


def place_labels(points: Sequence[Point], spots: Sequence[Spot], y: Scale) -> list[Label]:
    """Return a place for every label, in the order of the points."""
    taken = [box for point, spot in zip(points, spots, strict=True) for box in _marks(point, spot, y)]
    stairs = _stairs(points, spots)
    taken += [Box(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairwise(stairs)]
    placed = []
    for point, spot in zip(points, spots, strict=True):
        width = len(point.label) * LETTER
        best: tuple[float, Box, bool] | None = None
        for box, moved in _places(*spot, width):
            outside = (box.right - box.left) * LINE - box.overlap(PLOT)
            covered = sum(box.overlap(other) for other in taken) + 4 * max(outside, 0.0)
            if best is None or covered < best[0] - 1e-9:
                best = (covered, box, moved)
            if covered <= 0:
                break
        assert best is not None
        taken.append(best[1])
        chosen = best[1]
        anchor: Literal["start", "middle", "end"] = "middle"
        if chosen.left > spot[0] or chosen.right < spot[0]:
            anchor = "start" if chosen.left > spot[0] else "end"
        placed.append(Label(point.label, chosen, best[2], anchor))
    return placed


def _places(x: float, y: float, width: float) -> Iterator[tuple[Box, bool]]:
    """Boxes around (x, y) and whether each is far away: right, left, above, below, then the corners, near ones first."""
    for gap in (9, 16, 26, 40, 58, 80, 110, 150):
        half, near = LINE / 2, gap <= 16
        for left, top in (
            (x + gap, y - half),
            (x - gap - width, y - half),
            (x - width / 2, y - gap - LINE),
            (x - width / 2, y + gap),
            (x + gap, y - gap - LINE),
            (x + gap, y + gap),
            (x - gap - width, y - gap - LINE),
            (x - gap - width, y + gap),
        ):
            yield Box(left, top, left + width, top + LINE), not near


def _marks(point: Point, spot: Spot, y: Scale) -> list[Box]:
    centre, middle = spot
    boxes = [Box(centre - RADIUS - 1, middle - RADIUS - 1, centre + RADIUS + 1, middle + RADIUS + 1)]
    if math.isfinite(point.low) and math.isfinite(point.high):
        boxes.append(Box(centre - 3, y(point.high), centre + 3, y(point.low)))
    return boxes


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both cost and metric, by cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _stairs(points: Sequence[Point], spots: Sequence[Spot]) -> list[Spot]:
    """The corners of the line along the front: across first, then up."""
    drawn = dict(zip(points, spots, strict=True))
    corners: list[Spot] = []
    for point in front(points):
        across, up = drawn[point]
        if corners:
            corners.append((across, corners[-1][1]))
        corners.append((across, up))
    return corners


def _mark(point: Point, spot: Spot, y: Scale) -> Markup:
    style = point.kind if point.kind != "step" else f"run{point.run % COLOURS}"
    centre, middle = spot
    whisker: Markup | str = ""
    if math.isfinite(point.low) and math.isfinite(point.high):
        high, low = y(point.high), y(point.low)
        whisker = join(
            tag("line", x1=px(a), y1=px(b), x2=px(c), y2=px(d), class_=f"whisker {style}")
            for a, b, c, d in (
                (centre, high, centre, low),
                (centre - 3, high, centre + 3, high),
                (centre - 3, low, centre + 3, low),
            )
        )
    if point.kind == "original":
        shape = tag(
            "rect", x=px(centre - RADIUS), y=px(middle - RADIUS), width=2 * RADIUS, height=2 * RADIUS, class_=style
        )
    else:
        shape = tag("circle", cx=px(centre), cy=px(middle), r=RADIUS - 0.5, class_=style)
    hint = tag("title", f"{point.label}: {point.y:.3f} [{point.low:.3f}, {point.high:.3f}] at {_short(point.x)}")
    return tag("g", hint, whisker, shape)


def _leader(spot: Spot, label: Label) -> Markup:
    centre, middle = spot
    across = min(max(centre, label.box.left), label.box.right)
    down = min(max(middle, label.box.top + 2), label.box.bottom - 2)
    return tag("line", x1=px(centre), y1=px(middle), x2=px(across), y2=px(down), class_="leader")


def axes(x: Scale, y: Scale, x_label: str, y_label: str, plot: Box = PLOT) -> Markup:
    """Return lines, numbers and names of both axes of the rectangle `plot`."""
    parts = []
    for tick in y.ticks:
        parts.append(tag("line", x1=plot.left, x2=plot.right, y1=px(y(tick)), y2=px(y(tick)), class_="axis"))
        parts.append(tag("text", _short(tick), x=plot.left - 6, y=px(y(tick) + 4), text_anchor="end", class_="dim"))
    parts.append(tag("line", x1=plot.left, x2=plot.right, y1=plot.bottom, y2=plot.bottom, class_="axis"))
    for tick in x.ticks:
        parts.append(tag("line", x1=px(x(tick)), x2=px(x(tick)), y1=plot.bottom, y2=plot.bottom + 4, class_="axis"))
        parts.append(tag("text", _short(tick), x=px(x(tick)), y=plot.bottom + 17, text_anchor="middle", class_="dim"))
    middle = (plot.top + plot.bottom) / 2
    parts.append(tag("text", x_label, x=(plot.left + plot.right) / 2, y=plot.bottom + 36, text_anchor="middle"))
    parts.append(
        tag("text", y_label, x=0, y=0, text_anchor="middle", transform=f"translate(14 {middle:g}) rotate(-90)")
    )
    return join(parts)


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return an axis from `low` to `high`, drawn from pixel `start` to `end`."""
    step = nice_step((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    ticks = tuple(round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1))
    return Scale(low, high, start, end, ticks)


def nice_step(rough: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that is at most `rough`, so that ticks are round numbers."""
    power = 10.0 ** math.floor(math.log10(rough))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= rough * (1 + 1e-9))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def px(value: float) -> str:
    """Return a coordinate as SVG writes it."""
    return f"{value:.1f}"
