"""`mmc bench`: latency, throughput, memory, MACs and bytes of models side by side, timed in turn in one run.

The first argument is what the others are compared with: in every runner both can use, and each one's best with the other's best.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mmcompress
from mmcompress.errors import MissingError, UsageError
from mmcompress.evaluate.findings import Finding
from mmcompress.jobs.arrays import TOKENS
from mmcompress.jobs.bench_answers import open_targets
from mmcompress.jobs.bench_targets import Target, Variant
from mmcompress.jobs.speed import BEST, Lane, Timing, TowerSpeed, speeds_between, time_lanes
from mmcompress.measure.machine import default_threads, machine_facts
from mmcompress.measure.memory import PeakMemory
from mmcompress.measure.runners import RUNNERS, RunnerSpec
from mmcompress.progress import Progress, Silent, track

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """What is timed and how."""

    runners: tuple[str, ...] = ()
    """Empty: every one that works here."""
    precisions: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    """Empty: all that the targets share."""
    batch: int = 1
    threads: int = 0
    """0: as many as OMP_NUM_THREADS says, else every usable core."""
    rounds: int = 100
    tokens: int = TOKENS
    new_tokens: int = 32
    """Of an answer, where models answer in text."""
    device: str = "cpu"
    memory: bool = True
    """Measure peak memory, in a fresh process for each."""


@dataclass(frozen=True)
class Row:
    """One target's tower in one runner."""

    timing: Timing
    memory: PeakMemory | None

    def to_json(self) -> dict[str, Any]:
        found = self.timing.latency.to_json()
        return {
            "target": self.timing.side,
            "tower": self.timing.tower,
            "runner": self.timing.runner,
            "batch": found["batch"],
            "mean_ms": found["mean_ms"],
            "median_ms": found["p50_ms"]["value"],
            **{key: found[key] for key in ("p50_ms", "p90_ms", "p99_ms")},
            "request_throughput": found["throughput"],
            "n": found["n"],
            "notes": found["notes"],
            "peak_memory_bytes": self.memory.peak if self.memory else None,
            "added_memory_bytes": self.memory.added if self.memory else None,
            "facts": self.timing.facts,
        }


@dataclass
class Bench:
    """A whole comparison."""

    settings: Settings
    machine: dict[str, Any]
    targets: list[dict[str, Any]] = field(default_factory=list)
    """name, kind, bytes, macs by tower, notes; the first is what the others are compared with."""
    rows: list[Row] = field(default_factory=list)
    speeds: list[tuple[str, TowerSpeed]] = field(default_factory=list)
    """(target, how much faster than the first)."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Milliseconds of preprocessing and of what follows, by target; see `Target.stages`."""

    @property
    def headlines(self) -> list[tuple[str, TowerSpeed]]:
        """Per target and tower the comparison that counts: best with best, or the only one there is."""
        chosen: dict[tuple[str, str], TowerSpeed] = {}
        for name, speed in self.speeds:
            if (name, speed.tower) not in chosen or speed.runner.startswith(BEST):
                chosen[name, speed.tower] = speed
        return [(name, speed) for (name, _), speed in chosen.items()]

    def findings(self) -> list[Finding]:
        """Return what a person must be told, the worst first."""
        counted = {id(speed) for _, speed in self.headlines}
        found = [
            (speed.ratio.value, _speed_finding(name, speed))
            for name, speed in self.speeds
            if id(speed) in counted or speed.ratio.high < 1
        ]
        order = {"bad": 0, "note": 1, "good": 2}
        found.sort(key=lambda item: (order[item[1].level], item[0]))
        busy = [Finding("note", self.machine["busy"])] if self.machine.get("busy") else []
        return [*(finding for _, finding in found), *busy]

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``--json`` and ``--save``; latencies are named as vLLM's benchmarks name them."""
        settings = {**vars(self.settings), "runners": list(self.settings.runners)}
        return {
            "schema": SCHEMA,
            "kind": "bench",
            "mmc": mmcompress.__version__,
            "config": {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            "machine": self.machine,
            "targets": self.targets,
            "results": [row.to_json() for row in self.rows],
            "ratios": [{"target": name, **speed.to_json()} for name, speed in self.speeds],
            "stages": self.stages,
            "findings": [finding.to_json() for finding in self.findings()],
        }


def bench(paths: Sequence[str], settings: Settings, progress: Progress | None = None) -> Bench:
    """Time what `paths` name against each other.

    Raises UsageError for a bad argument or a target no runner can take, MissingError for a runner that is not there.
    """
    progress = progress or Silent()
    threads = settings.threads or default_threads()
    runners = _runners(settings)
    made = Bench(settings, machine_facts(threads))
    with tempfile.TemporaryDirectory(prefix="mmc-bench-") as scratch:
        targets = open_targets(paths, settings.device, Path(scratch), settings.new_tokens, progress)
        variants = {target.name: _variants(target, runners, settings) for target in targets}
        for tower in _towers(targets, settings):
            sharing = [target for target in targets if tower in target.towers]
            timings = _time(sharing, variants, tower, threads, settings, progress)
            for target in sharing[1:] if sharing[0] is targets[0] else []:
                made.speeds += [
                    (target.name, replace(speed, against=targets[0].name))
                    for speed in speeds_between(targets[0].name, target.name, timings, threads)
                ]
            made.rows += [Row(timing, None) for timing in timings]
        if settings.memory and settings.device == "cpu":
            by_name = {target.name: target for target in targets}
            made.rows = [
                replace(row, memory=_memory(by_name[row.timing.side], row.timing, threads, settings))
                for row in track(made.rows, progress, "peak memory", len(made.rows))
            ]
        made.stages = [_stages(target, made.rows, settings.batch) for target in targets]
        made.targets = [
            {
                "name": target.name,
                "kind": target.kind,
                "bytes": target.bytes(),
                "macs": {tower: target.macs(tower, settings.tokens) for tower in target.towers},
                "notes": target.notes,
            }
            for target in targets
        ]
    return made


def require_speedup(made: Bench, least: float) -> str | None:
    """Return why the comparison misses `least` (the worst target and tower), or None when all reach it.

    Raises UsageError when there is nothing to compare.
    """
    if not made.headlines:
        raise UsageError("--require-speedup compares with the first argument; only one was given", hint="mmc bench A B")
    name, worst = min(made.headlines, key=lambda item: item[1].ratio.value)
    if worst.ratio.value >= least:
        return None
    return f"{name}, {worst.what}: {_shown(worst)}; at least {least:g}x is asked for"


def _runners(settings: Settings) -> tuple[str, ...]:
    kind = settings.device.partition(":")[0]
    if not settings.runners:
        return tuple(name for name, spec in RUNNERS.items() if kind in spec.devices and spec.available() is None)
    for name in settings.runners:
        spec: RunnerSpec | None = RUNNERS.get(name)
        if spec is None:
            raise UsageError(f"there is no runner '{name}'", hint="known: " + ", ".join(RUNNERS))
        reason = spec.available()
        if reason:
            raise MissingError(f"the runner '{name}' cannot be used: {reason}", hint=spec.install)
    return settings.runners


def _variants(target: Target, runners: Sequence[str], settings: Settings) -> list[Variant]:
    found = target.variants(runners, settings.precisions)
    if not found:
        if not settings.runners and target.engine:
            raise MissingError(f"{target.name} holds engines for {target.engine}, which cannot run here",
                               hint=RUNNERS[target.engine].install)  # fmt: skip
        names = ", ".join(runners) or "none"
        raise UsageError(
            f"{target.name} ({target.kind}) runs in none of the runners: {names}",
            hint="torch takes checkpoints, onnxruntime and openvino take checkpoints and exported directories",
        )
    return found


def _towers(targets: Sequence[Target], settings: Settings) -> list[str]:
    for name in settings.towers:
        if name not in targets[0].towers:
            raise UsageError(
                f"{targets[0].name} has no tower '{name}'", hint="its towers: " + ", ".join(targets[0].towers)
            )
    return [name for name in targets[0].towers if not settings.towers or name in settings.towers]


def _time(
    targets: Sequence[Target],
    variants: dict[str, list[Variant]],
    tower: str,
    threads: int,
    settings: Settings,
    progress: Progress,
) -> list[Timing]:
    lanes = [
        Lane(
            target.name,
            variant.label,
            target.loader(variant, tower, threads),
            target.arrays(tower, settings.batch, settings.tokens),
        )
        for target in targets
        for variant in variants[target.name]
    ]
    return time_lanes(lanes, tower=tower, batch=settings.batch, rounds=settings.rounds, progress=progress)


def _memory(target: Target, timing: Timing, threads: int, settings: Settings) -> PeakMemory | None:
    return target.memory(timing.runner, timing.tower, batch=settings.batch, tokens=settings.tokens, threads=threads)


def _stages(target: Target, rows: Sequence[Row], batch: int) -> dict[str, Any]:
    """What happens from raw samples to the result, each stage in the target's fastest runner."""
    best: dict[str, float] = {}
    for timing in (row.timing for row in rows if row.timing.side == target.name):
        median = timing.latency.p50_ms.value
        best[timing.tower] = min(best.get(timing.tower, median), median)
    return {"target": target.name, **target.stages(best, batch)}


def _speed_finding(name: str, speed: TowerSpeed) -> Finding:
    where = f"{name}, {speed.what}"
    if speed.ratio.high < 1:
        return Finding("bad", f"{_shown(speed)} — SLOWER than {speed.against}: {where}")
    if speed.ratio.low > 1:
        return Finding("good", f"{_shown(speed)} — faster than {speed.against}: {where}")
    return Finding("note", f"{_shown(speed)} — not measurably faster than {speed.against}: {where}")


def _shown(speed: TowerSpeed) -> str:
    return f"{speed.ratio.value:.2f}x [{speed.ratio.low:.2f}, {speed.ratio.high:.2f}] n={speed.ratio.n}"
