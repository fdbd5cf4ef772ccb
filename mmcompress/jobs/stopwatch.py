"""Timing a model in the making, exported as it would be: what passes ask that are given a budget of milliseconds."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from mmcompress.bundle import Bundle
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.jobs.speed import usable_runners
from mmcompress.recipe import Export

ROUNDS = 15


def stopwatch(export: Export) -> Callable[[Bundle, tuple[str, ...]], float]:
    """Return what tells how many milliseconds stages of a bundle take together, in the fastest of the runners of `export`.

    A stage is a part or what `jobs.bench` calls one; medians of `ROUNDS` calls at `export.batch` are added. It raises UsageError
    for a stage the exported model has not, and what exporting raises.
    """

    def milliseconds(bundle: Bundle, stages: tuple[str, ...]) -> float:
        runners = usable_runners(export.runners)
        settings = Settings(
            runners=runners, towers=stages, batch=export.batch, threads=export.threads, rounds=ROUNDS, memory=False
        )
        with tempfile.TemporaryDirectory(prefix="mmc-latency-") as scratch:
            exported = Path(scratch) / "trial"
            export_onnx(bundle, exported, precision=export.precision, batches=(1,))
            found = bench([str(exported)], settings)
        taken: dict[str, list[float]] = defaultdict(list)
        for row in found.rows:
            taken[row.timing.runner].append(row.timing.latency.p50_ms.value)
        return min(sum(times) for times in taken.values() if len(times) == len(stages))

    return milliseconds
