"""prune within a budget of milliseconds, on machines whose speed is known."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.jobs.compress import compress
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_ranking import ranked
from mmcompress.passes.prune_times import timed
from mmcompress.passes.prune_units import Group, count_costs
from mmcompress.progress import Silent
from mmcompress.recipe import parse
from tests import tiny
from tests.passes.timing import Layers, Timer, timed_by

FAMILY = "clip"
PLAIN: dict[str, Any] = {"score": "magnitude", "compensate": "none", "multiple": 1, "min_keep": 0.1}


def macs(bundle: Bundle) -> int:
    return sum(count_costs(bundle, tower).macs for tower in bundle.towers())


def timer(bundle: Bundle, stages: tuple[str, ...]) -> float:
    """A machine that computes a million products in a millisecond, after half of one in which it does nothing."""
    assert stages == ("vision", "text")
    return 0.5 + macs(bundle) / 1e6


def product(layer: nn.Module, rows: int) -> float:
    """What a Linear takes there."""
    return rows * layer.get_parameter("weight").numel() / 1e6


def machine(timer: Timer, layers: Layers = product) -> Any:
    return timed_by(timer, layers)


def run(latency_ms: float, **params: Any) -> tuple[Bundle, Plan]:
    bundle = tiny.bundle(FAMILY)
    made = Prune(latency_ms=latency_ms, **{**PLAIN, **params})
    made.check(bundle)
    plan = made.plan(bundle, Context(data=tiny.data(FAMILY, 4), num_samples=4, stopwatch=machine(timer)))
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


def test_what_stays_is_repaired_after_the_trials() -> None:
    whole = timer(tiny.bundle(FAMILY), ("vision", "text"))
    bundle, plan = run(0.5 + 0.6 * (whole - 0.5), score="taylor", compensate="least-squares")
    assert plan.tensors
    other = tiny.bundle(FAMILY)
    priced = timed(other, other.towers(), groups_of(other), machine(timer)(""), Silent())
    share = max(float(key) for key, took in plan.decisions["tried_ms"].items() if took <= 0.5 + 0.6 * (whole - 0.5))
    made = Prune(**{**PLAIN, "score": "taylor", "compensate": "least-squares"}, latency_ms=1.0, ratio=1 - share)
    again = made.planned(other, Context(data=tiny.data(FAMILY, 4), num_samples=4), timed=priced)
    made.apply(other, again)
    assert {**again.decisions, "tried_ms": plan.decisions["tried_ms"]} == plan.decisions
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in bundle.model.state_dict().items())


def groups_of(bundle: Bundle, *units: str) -> list[Group]:
    made = Prune(**PLAIN)
    found: list[Group] = made.survey(bundle, made.chosen(bundle), units)[1]
    return found


def test_what_units_take_by_hand() -> None:
    """Half the difference between all and half of the units; attention's own products as their MACs."""
    bundle = tiny.bundle(FAMILY)
    groups = groups_of(bundle)
    priced = timed(bundle, bundle.towers(), groups, machine(timer)(""), Silent())
    assert [replace(group, nanoseconds=0) for group in priced] == groups
    # A machine of a million products in a millisecond: MACs are nanoseconds.
    assert [group.nanoseconds for group in priced] == [group.cost.macs for group in groups]

    def fixed(layer: nn.Module, rows: int) -> float:
        return 0.003 + product(layer, rows)  # what every call costs, no unit saves

    priced = timed(bundle, bundle.towers(), groups, machine(timer, fixed)(""), Silent())
    assert [group.nanoseconds for group in priced] == [group.cost.macs for group in groups]
    seen: list[tuple[int, int]] = []

    def noted(layer: nn.Module, rows: int) -> float:
        seen.append((int(layer.in_features), int(layer.out_features)))  # type: ignore[arg-type]
        return product(layer, rows)

    (neurons,) = timed(bundle, bundle.towers(), [groups[1]], machine(timer, noted)(""), Silent())
    width, count = bundle.module(neurons.writers[0]).in_features, neurons.units
    assert seen == [(width, count), (count, width), (width, count // 2), (count // 2, width)]
    # Half as wide nothing is quicker: a tenth of an equal part of four and of two layers' time.
    (heads, neurons, *_) = timed(bundle, bundle.towers(), groups, machine(timer, lambda *_: 1.0)(""), Silent())
    assert neurons.nanoseconds == round(1e6 * 0.1 * 2 / neurons.units)
    assert heads.nanoseconds > 1e6 * 0.1 * 4 / heads.units
    (block, *_) = timed(bundle, bundle.towers(), groups_of(bundle, "blocks"), machine(timer, fixed)(""), Silent())
    linears = [layer for layer in bundle.module(block.reader).modules() if isinstance(layer, nn.Linear)]
    assert block.nanoseconds == pytest.approx(block.cost.macs + 3000 * len(linears), rel=0.2)
    assert block.nanoseconds > block.cost.macs + 3000 * len(linears)


def test_what_takes_no_time_does_not_go() -> None:
    """Attention costs nothing here: only neurons go, though heads matter least."""
    bundle = tiny.bundle(FAMILY)
    with torch.no_grad():
        for group in groups_of(bundle, "heads"):
            for path in (*group.writers, group.reader):
                bundle.module(path).get_parameter("weight").mul_(1e-3)

    def only_neurons(layer: nn.Module, rows: int) -> float:
        square = layer.in_features == layer.out_features or 2 * layer.out_features <= layer.in_features  # type: ignore[operator]
        wide = max(layer.in_features, layer.out_features) > 64  # type: ignore[type-var,call-overload]
        return product(layer, rows) if wide and not square else 1e-9

    whole = timer(bundle, ("vision", "text"))
    made = Prune(latency_ms=0.5 + 0.9 * (whole - 0.5), normalise="none", **PLAIN)
    plan = made.plan(bundle, Context(stopwatch=machine(timer, only_neurons)))
    assert plan.decisions["kept"]["neurons"]
    assert not plan.decisions["kept"]["heads"]
    heads = (
        Prune(ratio=0.1, budget="macs", normalise="none", **PLAIN).plan(bundle, Context()).decisions["kept"]["heads"]
    )
    assert heads  # which MACs alone would take


def test_a_share_that_takes_longer_than_a_larger_one_is_no_reason_to_give_up() -> None:
    """Odd widths are slow: here a third of all shares."""
    whole = timer(tiny.bundle(FAMILY), ("vision", "text"))

    def uneven(bundle: Bundle, stages: tuple[str, ...]) -> float:
        took = timer(bundle, stages)
        return took * (1.6 if 0.6 < took / whole < 0.8 else 1.0)

    bundle = tiny.bundle(FAMILY)
    made = Prune(latency_ms=0.95 * whole, **PLAIN)
    plan = made.plan(bundle, Context(stopwatch=machine(uneven)))
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

    plan = Prune(latency_ms=allowed, **PLAIN).plan(tiny.bundle(FAMILY), Context(stopwatch=machine(disturbed)))
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
        "steps": [{"prune": {**PLAIN, "latency_ms": 60_000.0, "units": ["neurons"], "towers": ["vision"]}}],
        "export": {"runners": ["onnxruntime"]},
    }
    result = compress(copy.deepcopy(bundle), parse(recipe), tmp_path / "out")
    tried = result.manifest.records[-1].plan["tried_ms"]
    assert list(tried) == ["1.0000"]
    assert 0 < tried["1.0000"] < 60_000
