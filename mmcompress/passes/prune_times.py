"""What units of `prune` take in an engine: a table of measured costs, for budgets of milliseconds.

The Linears that units are cut from are timed alone, exported, as they are and with half of the units; the difference is what a unit
takes. So the table knows what MACs do not: which products this engine and machine are quick at, and what does not shrink with
them. The products of an attention's own, which are no layer, count as their MACs do in its Linears. Alone a layer finds other
caches than in a model: the table shares out a budget, and the whole model is timed to say how large that may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Stopwatch
from mmcompress.passes.latency import linear_rows
from mmcompress.passes.prune_units import Group
from mmcompress.progress import Progress, track
from mmcompress.views import Tower

LEAST = 0.1
"""What a unit takes at least, as a share of an equal part of its Linears' time: half as wide, some products are no quicker."""


def timed(
    bundle: Bundle, towers: Sequence[Tower], groups: Sequence[Group], stopwatch: Stopwatch, progress: Progress
) -> list[Group]:
    """Return the groups with the nanoseconds that one unit of each takes. Layers of one shape are timed once."""
    rows = {path: count for tower in towers for path, count in linear_rows(bundle, tower).items()}
    return [
        replace(group, nanoseconds=max(1, round(1e6 * _milliseconds(bundle, group, rows, stopwatch))))
        for group in track(groups, progress, "timing units", len(groups))
    ]


def _milliseconds(bundle: Bundle, group: Group, rows: dict[str, int], stopwatch: Stopwatch) -> float:
    """Return what one unit takes; of a block, all of it."""
    within = [path for path in rows if path.startswith(f"{group.reader}.")] if group.kind == "blocks" else []
    paths = within or [path for path in (*group.writers, group.reader) if path in rows]
    linears = {path: bundle.module(path) for path in paths}
    before = sum(stopwatch.layer(linear, rows[path]) for path, linear in linears.items())
    macs = sum(rows[path] * _weights(linear) for path, linear in linears.items())
    left = group.units // 2  # none of a block
    after = sum(
        stopwatch.layer(_narrowed(linear, path == group.reader, left, group.units), rows[path])
        for path, linear in (linears.items() if left else ())
    )
    each = max((before - after) / (group.units - left), LEAST * before / group.units)
    return each * max(1.0, group.cost.macs * group.units / macs) if macs else 0.0


def _weights(linear: nn.Module) -> int:
    return linear.get_parameter("weight").numel()


def _narrowed(linear: nn.Module, reads: bool, left: int, units: int) -> nn.Linear:
    """Return a Linear as large as what is left of one that reads units, or writes them."""
    rows, columns = linear.get_parameter("weight").shape
    rows, columns = (rows, columns * left // units) if reads else (rows * left // units, columns)
    return nn.Linear(columns, rows, bias=getattr(linear, "bias", None) is not None)
