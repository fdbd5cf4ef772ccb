"""Timing exported artifacts against each other: every side in every runner, interleaved in one run, same threads.

A compressed artifact is compared with the original in the same runner, and each side's best runner with the other's best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmcompress.bundle import Bundle
from mmcompress.errors import MissingError, UsageError, closest
from mmcompress.export.artifact import Artifact, open_artifact
from mmcompress.export.onnx import experts_for, export_onnx
from mmcompress.jobs.arrays import TOKENS, arrays_for
from mmcompress.measure.answerer import part_specs, torch_runner
from mmcompress.measure.latency import Latency, LatencySamples, compare, interleaved
from mmcompress.measure.machine import default_threads, machine_facts
from mmcompress.measure.runner import Arrays, Runner
from mmcompress.measure.runners import RUNNERS, open_runner
from mmcompress.ops.statistics import Estimate
from mmcompress.parts import PAST, Exportable
from mmcompress.parts import TOKENS as TOKENS_AXIS
from mmcompress.passes.quantize_cache import cache_bytes
from mmcompress.progress import Progress
from mmcompress.recipe import Export

BEST = "best of each"
HALF = "the original in bf16"
FURTHER = "one further token"


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


@dataclass(frozen=True)
class Lane:
    """One tower of one side in one runner: how to load it, and what it is given."""

    side: str
    runner: str
    """What the lane is called in tables: a runner's name, with the precision where that is not the stored one."""
    load: Callable[[], Runner]
    inputs: Arrays


def time_lanes(
    lanes: Sequence[Lane], *, tower: str, batch: int, rounds: int, progress: Progress | None = None
) -> list[Timing]:
    """Time every lane, all interleaved in one run."""
    with contextlib.ExitStack() as stack:
        opened: list[Runner] = []
        for lane in lanes:
            runner = lane.load()
            stack.callback(runner.close)
            opened.append(runner)
        steps = {
            f"{lane.side} {lane.runner}": runner.bind(lane.inputs) for lane, runner in zip(lanes, opened, strict=True)
        }
        samples = interleaved(steps, rounds=rounds, progress=progress)
        return [
            Timing(lane.side, tower, lane.runner, taken.summary(batch), taken, runner.facts())
            for lane, runner, taken in zip(lanes, opened, samples.values(), strict=True)
        ]


def _lanes(
    sides: Mapping[str, Artifact],
    runners: Sequence[str],
    tower: str,
    batch: int,
    threads: int,
    precision: str = "fp32",
) -> list[Lane]:
    """One tower of every artifact in every runner; the inputs are the same for all sides."""
    return [
        Lane(
            side,
            name,
            partial(open_runner, name, artifact.path(tower), threads, "cpu", precision),
            example_arrays(artifact, tower, batch),
        )
        for side, artifact in sides.items()
        for name in runners
    ]


def _plain_half(original: Artifact, runners: Sequence[str], tower: str, batch: int, threads: int) -> list[Lane]:
    """The original in bfloat16, which costs nobody any work, where the processor has it in hardware."""
    flags = set(machine_facts().get("flags", ()))
    if "openvino" not in runners or not flags & {"avx512_bf16", "amx_bf16"}:
        return []
    return _lanes({HALF: original}, ["openvino"], tower, batch, threads, precision="bf16")


def _against_half(timings: Sequence[Timing], threads: int) -> list[TowerSpeed]:
    halves = [timing for timing in timings if timing.side == HALF]
    best = min((t for t in timings if t.side == "compressed"), key=lambda t: t.latency.p50_ms.value)
    rows = [_ratio(half, best, f"{BEST}: {half.runner} bf16 against {best.runner}", threads) for half in halves]
    return [dataclasses.replace(row, against=HALF) for row in rows]


def example_arrays(artifact: Artifact, tower: str, batch: int, tokens: int = TOKENS) -> Arrays:
    """Return deterministic inputs (B, …) of a component's graph; of one that writes, those of one further token.

    That one stands behind a text and, where a picture always has as many tokens, a picture.
    """
    specs = artifact.component(tower).inputs
    writes = any(PAST in spec.dims for spec in specs)
    outputs = (spec for component in artifact.components for spec in component.outputs)
    seen = next((spec.dims[1] for spec in outputs if spec.name == "image_embeds"), 0)
    past = tokens + (seen if isinstance(seen, int) else 0)
    return arrays_for(specs, batch, tokens, {TOKENS_AXIS: 1, PAST: past} if writes else None)


def speeds_between(before: str, after: str, timings: Sequence[Timing], threads: int) -> list[TowerSpeed]:
    """Return the ratios of one tower's timings: in each runner both sides have, and between the two sides' best ones."""
    first, second = ({t.runner: t for t in timings if t.side == side} for side in (before, after))
    both = [name for name in first if name in second]
    rows = [_ratio(first[name], second[name], name, threads) for name in both]
    if len(both) != 1 or len(first) > 1 or len(second) > 1:
        best, rival = (min(side.values(), key=lambda t: t.latency.p50_ms.value) for side in (first, second))
        rows.append(_ratio(best, rival, f"{BEST}: {best.runner} against {rival.runner}", threads))
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
    threads = export.threads or default_threads()
    experts = experts_for(names)
    shutil.rmtree(directory / "compressed", ignore_errors=True)
    if not (directory / "original").exists():
        export_onnx(original(), directory / "original", experts=experts, progress=progress)
    export_onnx(bundle, directory / "compressed", precision=export.precision, experts=experts, progress=progress)
    sides = {side: open_artifact(directory / side) for side in ("original", "compressed")}
    rows: list[TowerSpeed] = []
    known = {component.name for component in sides["original"].components}
    # A part that only the compressed model has is not compared with anything.
    for tower in (component.name for component in sides["compressed"].components if component.name in known):
        lanes = _lanes(sides, names, tower, export.batch, threads)
        lanes += _plain_half(sides["original"], names, tower, export.batch, threads)
        timings = time_lanes(lanes, tower=tower, batch=export.batch, rounds=export.rounds, progress=progress)
        rows += speeds_between("original", "compressed", timings, threads)
        rows += _against_half(timings, threads)
    return tuple(rows)


def compare_in_torch(
    original: Bundle, bundle: Bundle, threads: int, rounds: int, progress: Progress
) -> tuple[TowerSpeed, ...]:
    """Time the towers of two bundles against each other in torch, batch 1, on the device they are on.

    Of a bundle whose cache holds integers, one further token too: towers are timed without a cache.
    """
    sides = {"original": original, "compressed": bundle}
    lanes: dict[str, list[Lane]] = {}
    for tower in bundle.towers():
        for side, made in sides.items():
            load = partial(open_runner, "torch", partial(_encode, made, tower.name), threads, bundle.device.type)
            inputs = {name: value.cpu().numpy() for name, value in made.example_inputs(tower.name).items()}
            lanes.setdefault(tower.name, []).append(Lane(side, "torch", load, inputs))
    if cache_bytes(bundle):
        lanes[FURTHER] = [_further(side, made, threads) for side, made in sides.items()]
    rows = []
    for name, pair in lanes.items():
        before, after = time_lanes(pair, tower=name, batch=1, rounds=rounds, progress=progress)
        rows.append(_ratio(before, after, "torch", threads))
    return tuple(rows)


def _further(side: str, bundle: Bundle, threads: int) -> Lane:
    """Return the part that writes in torch, given one token behind an example prompt."""
    assert isinstance(bundle.family, Exportable), "it has a cache"
    part = bundle.family.parts(bundle.model)[-1]
    past = bundle.example_inputs(bundle.forced.answering)["input_ids"].shape[1]
    inputs = arrays_for(part_specs(part), 1, sizes={TOKENS_AXIS: 1, PAST: past})
    return Lane(side, "torch", partial(torch_runner, bundle, part, threads), inputs)


def _encode(bundle: Bundle, tower: str, **inputs: Any) -> Any:
    return bundle.encode(tower, inputs)
