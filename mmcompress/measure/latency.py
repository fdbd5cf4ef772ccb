"""Latency, measured so that two runners can be compared on a machine that is never quiet.

All runners are timed in turn, once per round, in an order shuffled anew each round: whatever disturbs a round disturbs
all of them, and a ratio taken over rounds stays true where absolute times drift. A turn opens with untimed calls of the same
step, as if it ran in a loop of its own: the first calls after another model find that one's weights in the caches and
sleeping threads, which costs a small model more than a large one (`settle=0` measures just that). Times are wall-clock
around a step that returns only when its device is done. Very short steps are repeated within a round, so that the
clock's grain and the loop do not matter; a sample is then the mean of its repeats, which smooths the upper percentiles
(`repeats` says so).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcompress.errors import UsageError
from mmcompress.ops.statistics import Estimate, bootstrap, percentiles, ratio_of_medians
from mmcompress.progress import Progress, Silent

Step = Callable[[], None]

SHORTEST_SAMPLE = 1e-3
"""Seconds: steps below this are repeated until a sample takes at least as long."""
SETTLING = 0.02
"""Seconds of untimed calls that open a turn, between 1 and 8 calls."""
DEFAULT_ROUNDS = 30
FEWEST_ROUNDS = 10
"""With `min_seconds`, at least so many rounds are run."""


@dataclass(frozen=True)
class Latency:
    """Summary of one runner, in milliseconds per call; throughput in items per second at the median.

    p90_ms and p99_ms are None with fewer than 10 and 100 samples: they would be little more than the maximum.
    """

    batch: int
    p50_ms: Estimate
    p90_ms: float | None
    p99_ms: float | None
    mean_ms: float
    throughput: float
    n: int
    repeats: int

    @property
    def notes(self) -> list[str]:
        """What a reader has to know about these numbers."""
        notes = [
            f"p{rank} needs {samples_needed(rank)} samples, there are {self.n}"
            for rank, value in ((90, self.p90_ms), (99, self.p99_ms))
            if value is None
        ]
        if self.repeats > 1:
            notes.append(f"each sample is the mean of {self.repeats} calls, so p90 and p99 are smoothed")
        return notes

    def to_json(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "p50_ms": self.p50_ms.to_json(),
            "p90_ms": self.p90_ms,
            "p99_ms": self.p99_ms,
            "mean_ms": self.mean_ms,
            "throughput": self.throughput,
            "n": self.n,
            "repeats": self.repeats,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class LatencySamples:
    """Seconds per call in every round, `seconds: (n,)`, in the order measured."""

    seconds: NDArray[np.float64]
    repeats: int = 1

    def summary(self, batch: int = 1, seed: int = 0) -> Latency:
        """Summarise; `batch` items were computed per call."""
        n, times = len(self.seconds), self.seconds * 1e3
        found = percentiles(times, (50, 90, 99))
        return Latency(
            batch=batch,
            p50_ms=bootstrap(times, np.median, seed=seed, block=max(1, round(n ** (1 / 3)))),
            p90_ms=found["p90"] if n >= samples_needed(90) else None,
            p99_ms=found["p99"] if n >= samples_needed(99) else None,
            mean_ms=float(times.mean()),
            throughput=batch / found["p50"] * 1e3,
            n=n,
            repeats=self.repeats,
        )


def interleaved(
    steps: Mapping[str, Step],
    *,
    warmup: int = 3,
    rounds: int | None = None,
    min_seconds: float | None = None,
    repeats: int | None = None,
    settle: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, LatencySamples]:
    """Time `steps` against each other; a step is what `Runner.bind` returns: it computes once and waits for the device.

    Every step is called `warmup` times, then once (or `repeats` times) per round, for `rounds` rounds (default 30) or
    until `min_seconds` have passed. `settle` untimed calls precede each timed one, by default as many as take SETTLING
    seconds; with 0 a step starts with the caches the previous one left, as in a program with other work between calls.
    The garbage collector is off while timing. Raises UsageError for settings that make no sense; what a step raises
    carries a note that names it.
    """
    _check(steps, rounds, min_seconds, warmup, repeats, settle)
    progress = progress or Silent()
    limit = DEFAULT_ROUNDS if rounds is None and min_seconds is None else rounds
    order = np.random.default_rng(seed)
    names = list(steps)
    taken: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        counts = {name: _warm_up(name, steps[name], warmup, repeats, settle) for name in names}
        progress.start(f"timing {', '.join(names)}", limit)
        try:
            start = time.perf_counter()
            done = 0
            while not _enough(done, limit, time.perf_counter() - start, min_seconds):
                for i in order.permutation(len(names)):
                    name = names[i]
                    with _Named(name):
                        for _ in range(counts[name].settle):
                            steps[name]()
                        taken[name].append(_timed(steps[name], counts[name].repeats))
                done += 1
                progress.advance()
        finally:
            progress.finish()
    return {name: LatencySamples(np.array(taken[name]), counts[name].repeats) for name in names}


def compare(before: LatencySamples, after: LatencySamples, seed: int = 0) -> Estimate:
    """How many times faster `after` is: the ratio of medians with its interval, paired by round.

    Both must come from the same `interleaved` call; raises UsageError where the rounds differ in number.
    """
    if len(before.seconds) != len(after.seconds):
        raise UsageError(
            f"{len(before.seconds)} and {len(after.seconds)} rounds cannot be paired", hint="time both in one call"
        )
    return ratio_of_medians(before.seconds, after.seconds, seed=seed)


def samples_needed(rank: float) -> int:
    """Samples a percentile needs so that at least one is expected beyond it: 10 for p90, 100 for p99."""
    return math.ceil(round(100 / (100 - rank), 6))


class _Counts(NamedTuple):
    repeats: int
    settle: int


def _warm_up(name: str, step: Step, warmup: int, repeats: int | None, settle: int | None) -> _Counts:
    """Call `step` as often as asked, and find how many calls make a sample long enough and settle a turn."""
    with _Named(name):
        for _ in range(warmup):
            step()
        if repeats is None or settle is None:
            usual = max(sorted(_timed(step, 1) for _ in range(3))[1], 1e-7)
            repeats = repeats or math.ceil(SHORTEST_SAMPLE / usual)
            settle = min(8, math.ceil(SETTLING / usual)) if settle is None else settle
        return _Counts(repeats, settle)


def _timed(step: Step, repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        step()
    return (time.perf_counter_ns() - start) / repeats * 1e-9


def _enough(done: int, rounds: int | None, seconds: float, min_seconds: float | None) -> bool:
    if min_seconds is None:
        return rounds is not None and done >= rounds
    return done >= FEWEST_ROUNDS and seconds >= min_seconds


class _Named:
    """Adds to whatever a step raises a note that says which step it was."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"while timing '{self._name}'")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check(
    steps: Mapping[str, Step],
    rounds: int | None,
    min_seconds: float | None,
    warmup: int,
    repeats: int | None,
    settle: int | None,
) -> None:
    if not steps:
        raise UsageError("there is nothing to time", hint="name at least one artifact")
    if rounds is not None and min_seconds is not None:
        raise UsageError("both a number of rounds and a time were given", hint="give one of them")
    least = {"rounds": (rounds, 1), "warmup": (warmup, 0), "repeats": (repeats, 1), "settle": (settle, 0)}
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise UsageError(f"{name} is {value}, the least is {smallest}", hint=f"give {name} a larger number")
    if min_seconds is not None and not 0 < min_seconds < math.inf:
        raise UsageError(f"min_seconds is {min_seconds}, expected a positive time", hint="such as 10")
