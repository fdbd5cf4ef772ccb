"""search-prune: what goes is what the gates' gradients say, in steps that end at the whole budget; and only then it is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress import passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Record
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_state import State
from mmcompress.passes.prune import Prune
from mmcompress.passes.search_gates import Search
from mmcompress.passes.search_prune import SearchPrune
from mmcompress.recipe import Step
from mmcompress.surgery.gates import Gates
from tests import tiny
from tests.passes import searching

ROOT = Path(__file__).parents[2]
QUICK = {"ratio": 0.2, "steps": 6, "interval": 2, "batch_size": 4, "learning_rate": 1e-3, "multiple": 1, "amp": False}


def context(family: str, **more: Any) -> Context:
    return Context(data=tiny.data(family, 12), teacher=lambda: tiny.bundle(family), **more)


def run(
    family: str, bundle: Bundle | None = None, more: dict[str, Any] | None = None, **given: Any
) -> tuple[Bundle, Record]:
    bundle = bundle or tiny.bundle(family)
    params = {**QUICK, **given}
    stage = pipeline.Stage(1, Step("search-prune", params), passes.build("search-prune", params))
    return bundle, pipeline.run_stage(bundle, stage, context(family, **(more or {})))


def search_of(bundle: Bundle, method: str, steps: int, ratio: float = 0.2) -> tuple[Search, dict[str, Tensor]]:
    prune = Prune(ratio=ratio, score="magnitude", compensate="none", multiple=1)
    _, groups, bounds, wanted = prune.survey(bundle, bundle.towers())
    gates = Gates(bundle.model, {group.reader: group.units for group in groups})
    search = Search("clip", method, 1, groups, wanted, bounds, "parameters", gates, Ranks(), seed=0)
    return search, gates.values


def give(values: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    for path, value in values.items():
        value.grad = gradients[path].clone() + (0 if value.grad is None else value.grad)  # as backward passes do


def test_gates_close_along_the_schedule_and_only_the_last_step_closes_them() -> None:
    bundle = tiny.bundle("clip")
    search, values = search_of(bundle, "upop", 4)
    generator = torch.Generator().manual_seed(0)
    closed = []
    for step in range(4):
        search.before(step, 4)
        give(values, {path: torch.randn(value.shape, generator=generator) for path, value in values.items()})
        search.after(step, 4)
        found = torch.cat([value.detach() for value in values.values()])
        # sin(pi (t+1) / 8): 0.3827, 0.7071, 0.9239, 1
        wanted = [0.3826834, 0.7071068, 0.9238795, 1.0][step]
        assert sorted(set(found.tolist())) == pytest.approx(sorted({1 - wanted, 1.0}), abs=1e-6)
        closed.append(sum(group.cost.parameters * int((values[group.reader] < 1).sum()) for group in search.groups))
        (pool,) = search.pools
        dearest = max(group.cost.parameters for group in search.groups)
        assert int(pool.remove * wanted) <= closed[-1] < pool.remove * wanted + dearest


def test_what_would_raise_the_loss_by_opening_goes_first() -> None:
    bundle = tiny.bundle("clip")
    search, values = search_of(bundle, "upop", 1)
    gradients = {path: torch.linspace(-1, 1, len(value)) for path, value in values.items()}
    give(values, gradients)
    search.after(0, 1)
    gone = [
        gradients[group.reader][[u for u in range(group.units) if u not in kept]]
        for group, kept in search.cut().items()
    ]
    stayed = [gradients[group.reader][kept] for group, kept in search.cut().items() if group.kind == "neurons"]
    assert torch.cat(gone).min() > 0
    assert torch.cat(stayed).min() < 0


def test_squares_keep_what_the_loss_depends_on_either_way() -> None:
    bundle = tiny.bundle("clip")
    search, values = search_of(bundle, "fisher", 1)
    gradients = {path: torch.linspace(-1, 1, len(value)) for path, value in values.items()}
    give(values, gradients)
    search.after(0, 1)
    neurons = {group: kept for group, kept in search.cut().items() if group.kind == "neurons"}
    assert neurons
    for group, kept in neurons.items():
        sizes = gradients[group.reader].abs()
        gone = [unit for unit in range(group.units) if unit not in kept]
        assert sizes[gone].max() <= sizes[kept].min() + 1e-6


def test_a_unit_that_was_chosen_may_come_back() -> None:
    bundle = tiny.bundle("clip")
    search, values = search_of(bundle, "upop", 2)
    rising = {path: torch.linspace(-1, 1, len(value)) for path, value in values.items()}
    give(values, rising)
    search.after(0, 2)
    first = {path: (value < 1).nonzero().flatten().tolist() for path, value in values.items()}
    give(values, {path: -3 * value for path, value in rising.items()})
    search.after(1, 2)
    last = {path: (value < 1).nonzero().flatten().tolist() for path, value in values.items()}
    assert any(first.values())
    assert all(not set(first[path]) & set(last[path]) for path in first)


def test_gradients_of_what_is_only_timed_do_not_count() -> None:
    bundle = tiny.bundle("clip")
    search, values = search_of(bundle, "upop", 2)
    give(values, {path: torch.ones_like(value) for path, value in values.items()})
    search.before(0, 2)
    give(values, {path: torch.full_like(value, 2.0) for path, value in values.items()})
    search.after(0, 2)
    assert all((total == 2).all() for total in search.sums.values())


def test_gradients_that_are_not_finite_are_refused() -> None:
    bundle = tiny.bundle("clip")
    search, values = search_of(bundle, "upop", 2)
    give(values, {path: torch.full_like(value, torch.nan) for path, value in values.items()})
    with pytest.raises(UsageError, match="not finite at step 1"):
        search.after(0, 2)


@pytest.mark.parametrize("family", ["clip", "whisper", "llava_clip"])
def test_promised_is_recounted_and_weights_are_trained(family: str) -> None:
    original = dict(tiny.bundle(family).model.named_parameters())
    bundle, record = run(family)
    assert record.facts["recount"] == record.plan["after"]
    before, after = (sum(costs["parameters"] for costs in record.plan[when].values()) for when in ("before", "after"))
    assert 0.8 * before - 60 * 2 <= after <= 0.8 * before
    assert record.facts["steps"] == 6
    name, norm = next((n, p) for n, p in bundle.model.named_parameters() if "norm" in n and p.ndim == 1)
    assert not torch.equal(norm, original[name])


def test_trained_is_nearer_to_the_teacher_than_the_same_cut_untrained() -> None:
    plan = SearchPrune(**{**QUICK, "steps": 40}).plan(tiny.bundle("clip"), context("clip"))
    original, trained, cut = (tiny.bundle("clip") for _ in range(3))
    SearchPrune(**QUICK).apply(trained, plan)
    SearchPrune(**QUICK).apply(cut, Plan(plan.decisions))
    inputs = original.prepare("vision", tiny.images(12))
    wanted, learnt, untrained = (each.encode("vision", inputs).detach() for each in (original, trained, cut))
    near, far = (torch.cosine_similarity(made, wanted).mean() for made in (learnt, untrained))
    assert 1 - near < 0.5 * (1 - far)


def test_plan_changes_nothing_and_leaves_no_hook() -> None:
    bundle = tiny.bundle("clip")
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    SearchPrune(**QUICK).plan(bundle, context("clip"))
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in bundle.model.modules())


def test_random_is_the_control() -> None:
    control = SearchPrune(**QUICK).control()
    assert control is not None
    assert control.method == "random"
    assert control.control() is None
    _, first = run("clip", method="random")
    _, second = run("clip", method="random", more={"seed": 1})
    assert first.plan["kept"] != second.plan["kept"]


def test_a_killed_search_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, record = run("clip", save_minutes=0.0, more={"workdir": tmp_path / "one"})

    def stops(self: State, *values: Any) -> None:
        save(self, *values)
        if self.step == 3:
            raise KeyboardInterrupt

    save = State.save
    monkeypatch.setattr(State, "save", stops)
    with pytest.raises(KeyboardInterrupt):
        run("clip", save_minutes=0.0, more={"workdir": tmp_path / "two"})
    monkeypatch.setattr(State, "save", save)
    resumed, again = run("clip", save_minutes=0.0, more={"workdir": tmp_path / "two"})
    assert again.plan == record.plan
    assert again.facts["curve"] == record.facts["curve"]
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"interval": 0}, "search-prune.interval is 0"),
        ({"units": ("blocks",)}, "units names blocks"),
        ({"ratio": 1.2}, "search-prune.ratio is 1.2"),
        ({"learning_rate": 0.0}, "search-prune.learning_rate is 0.0"),
    ],
)
def test_bad_parameters_name_this_pass(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchPrune(**given)


def test_two_processes_decide_what_one_with_twice_the_batch_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, how, batch in (("pair", launcher, 4), ("alone", [], 8)):
        # Hardly trained, so that only gates' gradients tell units apart: AdamW makes much of gradients that are noise.
        given = json.dumps({**QUICK, "batch_size": batch, "learning_rate": 1e-7, "clip": 0.0})
        command = [sys.executable, *how, searching.__file__, str(tmp_path / name), given]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    alone, first, second = (json.loads((tmp_path / name).read_text()) for name in ("alone.0", "pair.0", "pair.1"))
    assert any(alone["neurons"].values())
    assert first == second == alone
