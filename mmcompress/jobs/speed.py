"""Timing exported artifacts against each other: every side in every runner, interleaved in one run, same threads.

A compressed artifact is compared with the original in the same runner, and each side's best runner with the other's best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.bundle import Bundle
from mmcompress.errors import MissingError, UsageError, closest
from mmcompress.export.artifact import Artifact, open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.latency import Latency, LatencySamples, compare, interleaved
from mmcompress.measure.machine import usable_cores
from mmcompress.measure.runners import RUNNERS, open_runner
from mmcompress.ops.statistics import Estimate
from mmcompress.progress import Progress
from mmcompress.recipe import Export

BEST = "best of each"


@dataclass(frozen=True)
class TowerSpeed:
    """How many times faster one side is than the other, for one tower in one runner."""

    tower: str
    runner: str
    """A runner's name, or "best of each: X against Y"."""
    batch: int
    threads: int
    before_ms: float
    after_ms: float
    ratio: Estimate
    against: str = "the original"

    @property
    def what(self) -> str:
        return f"{self.tower}, batch {self.batch}, {self.threads} threads, {self.runner}"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio.to_json()}


@dataclass(frozen=True)
class Timing:
    """One artifact's tower in one runner."""

    side: str
    tower: str
    runner: str
    latency: Latency
    samples: LatencySamples
    facts: dict[str, Any]


def usable_runners(wanted: Sequence[str], device: str = "cpu") -> tuple[str, ...]:
    """Return the runners to use: those asked for, or every one for ONNX files that works here.

    Raises MissingError when one asked for is not there, or none is; UsageError for an unknown name.
    """
    for name in wanted:
        if name not in RUNNERS:
            raise UsageError(f"there is no runner '{name}'", hint=closest(name, RUNNERS))
        reason = RUNNERS[name].available()
        if reason:
            raise MissingError(f"the runner '{name}' cannot be used: {reason}", hint=RUNNERS[name].install)
    if wanted:
        return tuple(wanted)
    found = [
        name
        for name, spec in RUNNERS.items()
        if ".onnx" in spec.suffixes and device in spec.devices and spec.available() is None
    ]
    if not found:
        raise MissingError("no runtime for ONNX files is installed", hint=RUNNERS["onnxruntime"].install)
    return tuple(found)


def time_artifacts(
    sides: Mapping[str, Artifact],
    runners: Sequence[str],
    *,
    tower: str,
    batch: int,
    threads: int,
    rounds: int,
    device: str = "cpu",
    precision: str = "fp32",
    progress: Progress | None = None,
) -> list[Timing]:
    """Time one tower of every artifact in every runner, all interleaved. Inputs are the same for all sides."""
    with contextlib.ExitStack() as stack:
        opened = {}
        for side, artifact in sides.items():
            for name in runners:
                runner = open_runner(name, artifact.path(tower), threads, device, precision)
                stack.callback(runner.close)
                opened[side, name] = runner
        steps = {
            f"{side} {name}": runner.bind(example_arrays(sides[side], tower, batch))
            for (side, name), runner in opened.items()
        }
        samples = interleaved(steps, rounds=rounds, progress=progress)
        return [
            Timing(
                side, tower, name, samples[f"{side} {name}"].summary(batch), samples[f"{side} {name}"], runner.facts()
            )
            for (side, name), runner in opened.items()
        ]


def example_arrays(artifact: Artifact, tower: str, batch: int, tokens: int = 16) -> dict[str, np.ndarray]:
    """Return deterministic inputs (B, …) of a component's graph: noise for floats, small ids and full masks for integers."""
    generator = np.random.default_rng(0)
    arrays = {}
    for spec in artifact.component(tower).inputs:
        shape = [dim if isinstance(dim, int) else batch if dim == "batch" else tokens for dim in spec.dims]
        if "float" in spec.dtype:
            arrays[spec.name] = generator.standard_normal(shape).astype(np.float32)
        elif "mask" in spec.name:
            arrays[spec.name] = np.ones(shape, dtype=np.dtype(spec.dtype))
        elif "shape" in spec.name:
            side = int(np.sqrt(next(s.dims[1] for s in artifact.component(tower).inputs if "float" in s.dtype)))
            arrays[spec.name] = np.full(shape, side, dtype=np.dtype(spec.dtype))
        else:
            arrays[spec.name] = generator.integers(1, 4, shape).astype(np.dtype(spec.dtype))
    return arrays


def speeds_between(before: str, after: str, timings: Sequence[Timing], threads: int) -> list[TowerSpeed]:
    """Return the ratios of one tower's timings: in each runner, and between the two sides' best ones."""
    sides = {side: {t.runner: t for t in timings if t.side == side} for side in (before, after)}
    rows = [_ratio(sides[before][name], sides[after][name], name, threads) for name in sides[before]]
    if len(sides[before]) > 1:
        first, second = (min(side.values(), key=lambda t: t.latency.p50_ms.value) for side in sides.values())
        rows.append(_ratio(first, second, f"{BEST}: {first.runner} against {second.runner}", threads))
    return rows


def _ratio(before: Timing, after: Timing, runner: str, threads: int) -> TowerSpeed:
    return TowerSpeed(
        tower=before.tower,
        runner=runner,
        batch=before.latency.batch,
        threads=threads,
        before_ms=before.latency.p50_ms.value,
        after_ms=after.latency.p50_ms.value,
        ratio=compare(before.samples, after.samples),
    )


def compare_exports(
    original: Callable[[], Bundle], bundle: Bundle, directory: Path, export: Export, progress: Progress
) -> tuple[TowerSpeed, ...]:
    """Export the original and the bundle under `directory` ("original", "compressed") and time them against each other."""
    names = usable_runners(export.runners)
    threads = export.threads or usable_cores()
    shutil.rmtree(directory / "compressed", ignore_errors=True)
    if not (directory / "original").exists():
        export_onnx(original(), directory / "original", progress=progress)
    export_onnx(bundle, directory / "compressed", precision=export.precision, progress=progress)
    sides = {side: open_artifact(directory / side) for side in ("original", "compressed")}
    rows: list[TowerSpeed] = []
    for component in sides["compressed"].components:
        timings = time_artifacts(
            sides,
            names,
            tower=component.name,
            batch=export.batch,
            threads=threads,
            rounds=export.rounds,
            progress=progress,
        )
        rows += speeds_between("original", "compressed", timings, threads)
    return tuple(rows)
