"""Timing a model in the making, exported as it would be: what passes ask that are given a budget of milliseconds."""

from __future__ import annotations

import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.export.layer import export_layer
from mmcompress.export.onnx import experts_for, export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.jobs.speed import usable_runners
from mmcompress.measure.latency import interleaved
from mmcompress.measure.machine import default_threads
from mmcompress.measure.runners import open_runner
from mmcompress.recipe import Export

ROUNDS = 15
ENGINES = {"cpu": "onnxruntime", "openvino": "openvino"}
"""The runner that each target of `quantize` is timed in."""


class ExportedStopwatch:
    """Times in the engine of one target, or in the fastest of the runners of `export`. See `passes.base.Stopwatch`."""

    def __init__(self, export: Export, target: str = "") -> None:
        self._export, self._threads = export, export.threads or default_threads()
        self._asked = (ENGINES[target],) if target else export.runners
        self._known: dict[tuple[str, int], float] = {}

    def model(self, bundle: Bundle, stages: tuple[str, ...]) -> float:
        """Return the sum of the stages' medians of `ROUNDS` calls at `export.batch`; a stage is one of `jobs.bench`, or a part.

        Raises UsageError for a stage the exported model has not, and what exporting raises.
        """
        export = self._export
        settings = Settings(
            runners=usable_runners(self._asked),
            towers=stages,
            batch=export.batch,
            threads=export.threads,
            rounds=ROUNDS,
            memory=False,
        )
        with tempfile.TemporaryDirectory(prefix="mmc-latency-") as scratch:
            exported = Path(scratch) / "trial"
            experts = experts_for(settings.runners)
            # A tower that embeds is timed alone; what answers is one whole.
            embedding = isinstance(bundle.family, DualEncoder)
            alone = [tower.name for tower in bundle.towers() if tower.name in stages] if embedding else None
            export_onnx(bundle, exported, towers=alone, precision=export.precision, batches=(1,), experts=experts)
            found = bench([str(exported)], settings)
        taken: dict[str, list[float]] = defaultdict(list)
        for row in found.rows:
            taken[row.timing.runner].append(row.timing.latency.p50_ms.value)
        return min(sum(times) for times in taken.values() if len(times) == len(stages))

    def layer(self, layer: nn.Module, rows: int) -> float:
        """Return the median of one Linear, quantized or not; of one kind and shape it is asked once."""
        # What a layer is printed as names its kind, its sizes and its scheme.
        key = (repr(layer), rows)
        if key not in self._known:
            self._known[key] = self._timed(layer, rows * self._export.batch)
        return self._known[key]

    def _timed(self, layer: nn.Module, rows: int) -> float:
        columns = int(layer.in_features)  # type: ignore[arg-type]
        values = np.random.default_rng(0).standard_normal((1, rows, columns), dtype=np.float32)
        with tempfile.TemporaryDirectory(prefix="mmc-latency-") as scratch:
            file = Path(scratch) / "layer.onnx"
            export_layer(layer, rows, columns, file)
            runner = open_runner(usable_runners(self._asked)[0], file, self._threads, "cpu")
            try:
                found = interleaved({"layer": runner.bind({"x": values})}, rounds=ROUNDS)
            finally:
                runner.close()
        return found["layer"].summary().p50_ms.value


def stopwatch(export: Export) -> Callable[[str], ExportedStopwatch]:
    """Return what makes the stopwatch of a target, one for each."""
    return functools.cache(functools.partial(ExportedStopwatch, export))
