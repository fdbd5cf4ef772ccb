"""prune within a budget of milliseconds, on machines whose speed is known."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.jobs.compress import compress
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_ranking import ranked
from mmcompress.passes.prune_units import count_costs
from mmcompress.recipe import parse
from tests import tiny
from tests.passes.timing import timed_by

FAMILY = "clip"
PLAIN: dict[str, Any] = {"score": "magnitude", "compensate": "none", "multiple": 1, "min_keep": 0.1}


def macs(bundle: Bundle) -> int:
    return sum(count_costs(bundle, tower).macs for tower in bundle.towers())


def timer(bundle: Bundle, stages: tuple[str, ...]) -> float:
    """A machine that computes a million products in a millisecond, after half of one in which it does nothing."""
    assert stages == ("vision", "text")
    return 0.5 + macs(bundle) / 1e6


def run(latency_ms: float, **params: Any) -> tuple[Bundle, Plan]:
    bundle = tiny.bundle(FAMILY)
    made = Prune(latency_ms=latency_ms, **{**PLAIN, **params})
    made.check(bundle)
    plan = made.plan(bundle, Context(data=tiny.data(FAMILY, 4), num_samples=4, stopwatch=timed_by(timer)))
    made.apply(bundle, plan)
    return bundle, plan


def test_least_goes_that_keeps_the_budget() -> None:
    whole = timer(tiny.bundle(FAMILY), ("vision", "text"))
    allowed = 0.5 + 0.6 * (whole - 0.5)
    bundle, plan = run(allowed)
    took = timer(bundle, ("vision", "text"))
    assert 0.95 * allowed < took <= allowed
    assert plan.decisions["tried_ms"]["1.0000"] == pytest.approx(whole, abs=1e-3)
    assert sum(after["macs"] for after in plan.decisions["after"].values()) == macs(bundle)
    unneeded, plan = run(whole + 0.01)
    assert plan.decisions["kept"] == {"heads": {}, "neurons": {}, "blocks": {}}
    assert macs(unneeded) == macs(tiny.bundle(FAMILY))


def test_what_is_chosen_is_what_a_ratio_chooses_and_repaired_all_the_same() -> None:
    whole = timer(tiny.bundle(FAMILY), ("vision", "text"))
    bundle, plan = run(0.5 + 0.6 * (whole - 0.5), score="taylor", compensate="least-squares")
    share = max(float(key) for key, took in plan.decisions["tried_ms"].items() if took <= 0.5 + 0.6 * (whole - 0.5))
    other = tiny.bundle(FAMILY)
    made = Prune(**{**PLAIN, "score": "taylor", "compensate": "least-squares"}, budget="macs", ratio=1 - share)
    again = made.plan(other, Context(data=tiny.data(FAMILY, 4), num_samples=4))
    made.apply(other, again)
    assert again.tensors
    assert {**again.decisions, "tried_ms": plan.decisions["tried_ms"]} == plan.decisions
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in bundle.model.state_dict().items())


def test_a_share_that_takes_longer_than_a_larger_one_is_no_reason_to_give_up() -> None:
    """Odd widths are slow: here a third of all shares."""
    whole = timer(tiny.bundle(FAMILY), ("vision", "text"))

    def uneven(bundle: Bundle, stages: tuple[str, ...]) -> float:
        took = timer(bundle, stages)
        return took * (1.6 if 0.6 < took / whole < 0.8 else 1.0)

    bundle = tiny.bundle(FAMILY)
    made = Prune(latency_ms=0.95 * whole, **PLAIN)
    plan = made.plan(bundle, Context(stopwatch=timed_by(uneven)))
    made.apply(bundle, plan)
    assert uneven(bundle, ("vision", "text")) <= 0.95 * whole
    tried = sorted((float(share), took) for share, took in plan.decisions["tried_ms"].items())
    assert [took for _, took in tried] != sorted(took for _, took in tried)


def test_a_share_that_was_disturbed_is_timed_again() -> None:
    """Every third timing is half as long again: nothing else is chosen for it."""
    whole = timer(tiny.bundle(FAMILY), ("vision", "text"))
    allowed, calls = 0.5 + 0.6 * (whole - 0.5), [0]

    def disturbed(bundle: Bundle, stages: tuple[str, ...]) -> float:
        calls[0] += 1
        return timer(bundle, stages) * (1.5 if calls[0] % 3 == 0 else 1.0)

    plan = Prune(latency_ms=allowed, **PLAIN).plan(tiny.bundle(FAMILY), Context(stopwatch=timed_by(disturbed)))
    assert plan.decisions["kept"] == run(allowed)[1].decisions["kept"]


def test_scores_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return ranked(*given)

    for place in ("prune", "prune_latency"):
        monkeypatch.setattr(f"mmcompress.passes.{place}.ranked", counted)
    run(0.5 + 0.6 * (timer(tiny.bundle(FAMILY), ("vision", "text")) - 0.5))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "params", [{}, {"uniform": True, "units": ("neurons",)}, {"units": ("blocks",), "score": "taylor"}]
)
def test_the_control_removes_as_much(params: dict[str, Any]) -> None:
    whole = timer(tiny.bundle(FAMILY), ("vision", "text"))
    allowed = 0.5 + 0.8 * (whole - 0.5)
    bundle, plan = run(allowed, **params)
    made = Prune(latency_ms=allowed, **{**PLAIN, **params})
    control = made.control(plan.decisions)
    assert control is not None
    assert (control.score, control.latency_ms) == ("random", None)
    other = tiny.bundle(FAMILY)
    control.apply(other, control.plan(other, Context(seed=1)))
    assert macs(other) <= macs(bundle)
    assert macs(other) > macs(bundle) - (macs(tiny.bundle(FAMILY)) - macs(bundle)) / 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"latency_ms": 0.51},
            r"prune.latency_ms is 0.51, but with the least that can stay \(keep 0\.\d+\) vision and text take",
        ),
        ({"latency_ms": -1.0}, "prune.latency_ms is -1; expected a number > 0"),
        ({"latency_ms": 1.0, "target": 1e6}, "prune has both target and latency_ms"),
        ({"latency_ms": 1.0, "ratios": {"text": 0.1}}, "prune has both ratios and latency_ms"),
    ],
)
def test_refusals(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        run(**params)
    assert raised.value.hint


def test_without_a_machine_to_try_on_it_is_refused() -> None:
    made = Prune(latency_ms=1.0, **PLAIN)
    with pytest.raises(UsageError, match="prune.latency_ms needs a run that may export and time") as raised:
        made.plan(tiny.bundle(FAMILY), Context())
    assert raised.value.hint == "use ratio"


def test_dry_runs_know_that_it_takes_time() -> None:
    work = Work(samples=1, dataset=1, forward=0.0)
    bundle = tiny.bundle(FAMILY)
    assert Prune(latency_ms=1.0, **PLAIN).seconds(bundle, work) > 60 > Prune(**PLAIN).seconds(bundle, work)


def test_a_run_exports_and_times_on_this_machine(tmp_path: Path) -> None:
    bundle = tiny.bundle(FAMILY)
    recipe = {
        "steps": [{"prune": {**PLAIN, "latency_ms": 60_000.0, "units": ["neurons"]}}],
        "export": {"runners": ["onnxruntime"]},
    }
    result = compress(copy.deepcopy(bundle), parse(recipe), tmp_path / "out")
    tried = result.manifest.records[-1].plan["tried_ms"]
    assert list(tried) == ["1.0000"]
    assert 0 < tried["1.0000"] < 60_000
