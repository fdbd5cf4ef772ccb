"""Interleaving laws on steps of known length, and summaries worked out by hand."""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mmcompress.errors import UsageError
from mmcompress.measure import latency
from mmcompress.measure.latency import LatencySamples, compare, interleaved, samples_needed


class Clock:
    """A clock that only moves when a step says so: timings become exact."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter_ns", lambda: round(self.now * 1e9))

    def step(self, name: str, seconds: float | Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_every_round_times_every_step_once_in_a_shuffled_order(clock: Clock) -> None:
    steps = {"a": clock.step("a", 0.004), "b": clock.step("b", 0.002)}
    found = interleaved(steps, warmup=0, repeats=1, settle=0, rounds=20, seed=1)
    rounds = [tuple(clock.calls[i : i + 2]) for i in range(0, 40, 2)]
    assert Counter(rounds).keys() == {("a", "b"), ("b", "a")}
    assert np.allclose(found["a"].seconds, 0.004)
    assert np.allclose(found["b"].seconds, 0.002)
    assert compare(found["a"], found["b"]).value == pytest.approx(2.0)
    again = [*clock.calls]
    clock.calls.clear()
    interleaved(steps, warmup=0, repeats=1, settle=0, rounds=20, seed=1)
    assert clock.calls == again


def test_warm_up_and_settling_calls_are_not_timed(clock: Clock) -> None:
    lengths = iter([0.9, 0.9] + [0.5, 0.002] * 3)
    found = interleaved({"a": clock.step("a", lambda: next(lengths))}, warmup=2, repeats=1, settle=1, rounds=3)
    assert np.allclose(found["a"].seconds, 0.002)


def test_a_turn_opens_with_as_many_untimed_calls_as_settle_it(clock: Clock) -> None:
    steps = {"short": clock.step("short", 0.0003), "usual": clock.step("usual", 0.006), "long": clock.step("long", 2.0)}
    interleaved(steps, warmup=0, rounds=2)
    turns = {
        "short": 8 + 4,
        "usual": 4 + 1,
        "long": 1 + 1,
    }  # 20 ms, at most 8 calls and at least 1; then the timed ones
    assert Counter(clock.calls) == {name: 3 + 2 * calls for name, calls in turns.items()}


def test_short_steps_are_repeated_until_a_sample_is_long_enough(clock: Clock) -> None:
    found = interleaved({"short": clock.step("short", 0.0003), "long": clock.step("long", 0.02)}, settle=0, rounds=5)
    assert (found["short"].repeats, found["long"].repeats) == (4, 1)
    assert np.allclose(found["short"].seconds, 0.0003)
    assert clock.calls.count("short") == 3 + 3 + 5 * 4


def test_a_time_limit_keeps_a_least_number_of_rounds(clock: Clock) -> None:
    steps = {"a": clock.step("a", 0.5)}
    assert len(interleaved(steps, min_seconds=0.1)["a"].seconds) == latency.FEWEST_ROUNDS
    assert len(interleaved(steps, min_seconds=10.0, settle=0)["a"].seconds) == 20
    assert len(interleaved(steps)["a"].seconds) == latency.DEFAULT_ROUNDS


def test_drift_of_the_machine_cancels_in_the_ratio(clock: Clock) -> None:
    generator = np.random.default_rng(0)

    def drifting(seconds: float) -> Callable[[], float]:
        return lambda: seconds * (1 + clock.now) * generator.uniform(0.98, 1.02)

    steps = {"a": clock.step("a", drifting(0.003)), "b": clock.step("b", drifting(0.002))}
    found = interleaved(steps, rounds=60, repeats=1)
    ratio = compare(found["a"], found["b"])
    assert ratio.low < 1.5 < ratio.high
    assert ratio.high - ratio.low < 0.15
    assert found["a"].seconds[-1] > 1.2 * found["a"].seconds[0]


def test_real_work_twice_as_long_is_seen_and_equal_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", time.thread_time_ns)  # processor time: other programs do not count
    values = np.random.default_rng(0).normal(size=30_000)

    def step() -> None:
        np.sort(values)

    found = interleaved({"one": step, "other": step, "double": lambda: (step(), step())[0]}, rounds=40)
    assert 0.7 < compare(found["one"], found["other"]).value < 1.4
    assert compare(found["double"], found["one"]).low > 1.3


def test_the_garbage_collector_is_off_inside_and_back_after(clock: Clock) -> None:
    seen: list[bool] = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=2, repeats=1)
    assert not any(seen)
    assert gc.isenabled()

    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as caught:
        interleaved({"good": lambda: None, "bad": fail}, rounds=1)
    assert caught.value.__notes__ == ["while timing 'bad'"]
    assert gc.isenabled()


def test_summary_by_hand() -> None:
    samples = LatencySamples(np.arange(1, 102) * 1e-3)  # 1..101 ms: median 51, p90 91, p99 100
    found = samples.summary(batch=8)
    assert found.p50_ms.value == pytest.approx(51)
    assert found.p50_ms.low < 51 < found.p50_ms.high
    assert (found.p90_ms, found.p99_ms, found.mean_ms) == pytest.approx((91, 100, 51))
    assert found.throughput == pytest.approx(8 / 0.051)
    assert found.notes == []
    assert json.loads(json.dumps(found.to_json()))["n"] == 101


def test_percentiles_too_few_samples_cannot_give_are_left_out_and_said() -> None:
    found = LatencySamples(np.full(99, 0.002), repeats=3).summary()
    assert found.p90_ms == pytest.approx(2.0)
    assert found.p99_ms is None
    assert found.notes == [
        "p99 needs 100 samples, there are 99",
        "each sample is the mean of 3 calls, so p90 and p99 are smoothed",
    ]
    assert LatencySamples(np.full(9, 0.002)).summary().p90_ms is None


def test_samples_of_different_runs_are_not_compared() -> None:
    with pytest.raises(UsageError, match="5 and 6 rounds"):
        compare(LatencySamples(np.ones(5)), LatencySamples(np.ones(6)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 5, "min_seconds": 1.0}, "both a number of rounds and a time"),
        ({"rounds": 0}, "rounds is 0, the least is 1"),
        ({"warmup": -1}, "warmup is -1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"min_seconds": 0.0}, "expected a positive time"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        interleaved({"a": lambda: None}, **settings)  # type: ignore[arg-type]


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to time"):
        interleaved({})


def test_samples_needed_for_a_percentile() -> None:
    assert [samples_needed(rank) for rank in (50, 90, 99, 99.9)] == [2, 10, 100, 1000]
