"""search-prune with method uvc: heads, neurons and blocks go together, their weights first, and the budget is met."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Plan
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_state import State
from mmcompress.passes.prune_split import decisions
from mmcompress.passes.search_joint import Joint, phases
from mmcompress.passes.search_prune import SearchPrune
from mmcompress.surgery.gates import Gates
from tests import tiny
from tests.passes.test_search_prune import run

ALL = ("heads", "neurons", "blocks")
STEPS = 20


def joint_of(bundle: Bundle, ranks: Ranks | None = None, **given: Any) -> tuple[Joint, Any]:
    settings = SearchPrune(method="uvc", multiple=1, **{"ratio": 0.3, "units": ALL, **given})
    totals, groups, bounds, wanted = settings._survey(bundle)
    gates = Gates(bundle.model, {}, [group.reader for group in groups if group.kind == "blocks"])
    joint = Joint("clip", 2, groups, wanted, bounds, "parameters", bundle.model, gates, ranks or Ranks(), 0)
    return joint, totals


def walk(joint: Joint, until: int = STEPS, useless: int | None = None) -> None:
    """Make steps in which weights do not train, and every block but the one called `useless` in each tower is needed."""
    blocks = {group.reader: group.block for group in joint.groups if group.kind == "blocks"}
    for step in range(until):
        joint.before(step, STEPS)
        for path, value in joint.gates.values.items():
            value.grad = torch.full_like(value, -0.01 if blocks[path] == useless else -1.0)
        joint.after(step, STEPS)


def outputs(bundle: Bundle) -> dict[str, Tensor]:
    return {tower.name: bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)) for tower in bundle.towers()}


def test_phases() -> None:
    assert phases(100) == (10, 70)
    assert phases(1) == (0, 1)
    assert all(0 <= phases(steps)[0] < phases(steps)[1] <= steps for steps in range(1, 60))


@torch.no_grad()
def test_masked_is_what_is_cut() -> None:
    bundle = tiny.bundle("clip")
    joint, totals = joint_of(bundle)
    before = outputs(bundle)
    walk(joint, useless=1)
    joint.before(STEPS - 1, STEPS)
    with joint.gates.open():
        masked = outputs(bundle)
    made = decisions(totals, joint.cut(), joint.bounds.depths)
    assert all(made["kept"].values())  # type: ignore[union-attr]
    # What the search takes it to cost is what it costs, whatever the parts of blocks that go would give up.
    (part,) = joint.parts
    gone = {(block.tower, block.block) for block in part.blocks if not joint.kept[block]}
    removed = [
        1.0 if (group.tower, group.block) in gone else group.units - float(joint.kept[group].sum())
        for group in part.groups
    ]
    assert gone
    keep = torch.cat([joint.kept[block] for block in part.blocks]).double()
    share = float(part.state.prices.cost(torch.tensor(removed, dtype=torch.float64), keep))
    assert share * part.pool.total == pytest.approx(sum(costs["parameters"] for costs in made["after"].values()))  # type: ignore[index, union-attr]
    cut = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model))
    SearchPrune(method="uvc", units=ALL).apply(cut, Plan(made))
    for name, found in outputs(cut).items():
        torch.testing.assert_close(found, masked[name], rtol=0, atol=1e-5)
        assert not torch.allclose(found, before[name], atol=1e-3)


@torch.no_grad()
def test_nothing_moves_while_it_warms_up_or_once_it_is_settled() -> None:
    bundle = tiny.bundle("clip")
    joint, _ = joint_of(bundle)
    weights = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    begin, end = phases(STEPS)
    walk(joint, until=begin)
    assert joint.parts[0].state.cost == 1
    assert all(torch.equal(value, weights[name]) for name, value in bundle.model.state_dict().items())
    walk(joint, until=end)
    found = {name: value.clone() for name, value in joint.tensors().items()}
    joint.before(end, STEPS)
    joint.after(end, STEPS)
    # What would grow again there stays gone.
    group, kept = next(
        (group, kept) for group, kept in joint.kept.items() if group.kind == "neurons" and not kept.all()
    )
    weight = bundle.model.get_parameter(f"{group.reader}.weight")
    weight.add_(1.0)
    joint.after(end + 1, STEPS)
    assert not weight[:, kept == 0].any()
    assert weight[:, kept == 1].all()
    assert all(torch.equal(value, found[name]) for name, value in joint.tensors().items())


@torch.no_grad()
def test_small_weights_shrink_and_go_and_a_block_nobody_needs_is_skipped() -> None:
    bundle = tiny.bundle("clip")
    joint, _ = joint_of(bundle, towers=("vision",))
    group = next(group for group in joint.groups if group.kind == "neurons" and group.block == 0)
    weight = bundle.model.get_parameter(f"{group.reader}.weight")
    weight[:, ::2] *= 0.01
    before = weight.clone()
    walk(joint, until=8, useless=1)
    shrunk = weight.norm(dim=0) / before.norm(dim=0)
    # All but one at most: a slope looks one unit ahead.
    assert shrunk[::2].sort().values[-2] < 0.5
    assert shrunk[1::2].min() == 1
    walk(joint, useless=1)
    gone = {group.block for group, kept in joint.kept.items() if group.kind == "blocks" and not kept.any()}
    assert gone == {1}
    # The others of the block are the block's; of those that stay, the small ones go first.
    assert joint.cut().keys().isdisjoint(g for g in joint.groups if g.block == 1 and g.kind != "blocks")
    kept = joint.kept[group]
    assert not kept.all()
    assert kept[1::2].sum() == len(kept) // 2 or not kept[::2].any()


def test_slopes_are_means_over_processes() -> None:
    class Two(Ranks):
        def gather(self, own: Tensor) -> Tensor:
            return torch.cat([own, 3 * own])

    alone, both = (joint_of(tiny.bundle("clip"), ranks)[0] for ranks in (Ranks(), Two()))
    for joint in (alone, both):
        walk(joint, until=3)
    assert alone.parts[0].slopes.any()
    torch.testing.assert_close(both.parts[0].slopes, 2 * alone.parts[0].slopes)


def test_gradients_that_are_not_finite_are_refused() -> None:
    joint, _ = joint_of(tiny.bundle("clip"))
    for value in joint.gates.values.values():
        value.grad = torch.full_like(value, torch.inf)
    with pytest.raises(UsageError, match="not finite at step 6"):
        joint.after(5, STEPS)


@pytest.mark.parametrize(("family", "units"), [("clip", ALL), ("whisper", ALL)])
def test_promised_is_recounted_and_the_budget_is_met(family: str, units: tuple[str, ...]) -> None:
    bundle, record = run(family, method="uvc", units=units, steps=12, ratio=0.3)
    assert record.facts["recount"] == record.plan["after"]
    before, after = (sum(costs["parameters"] for costs in record.plan[when].values()) for when in ("before", "after"))
    # The dearest neuron has two Linears of at most 48 rows or columns, and a bias.
    assert 0.7 * before - 2 * 48 - 1 <= after <= 0.7 * before
    (found,) = record.facts["search"]
    assert found["budget"] == pytest.approx(0.7, abs=1e-4)
    assert bool(found["keep"]) == ("blocks" in units)
    gone = sum(row["parameters"] for row in record.facts["split"])
    assert before - gone == after
    for row in record.facts["split"]:
        if row["kind"] == "neurons":
            assert row["after"] == sum(block.mlp.neurons for block in bundle.tower(row["tower"]).blocks)
    if family == "clip":
        assert bundle.model.config.vision_config.num_hidden_layers == len(bundle.tower("vision").blocks)


def test_bounds_hold() -> None:
    given = {"method": "uvc", "units": ALL, "ratio": 0.25, "steps": 8, "multiple": 8, "protect": (0,), "min_keep": 0.5}
    bundle, record = run("clip", **given)
    whole = tiny.bundle("clip")
    for tower in bundle.towers():
        original = whole.tower(tower.name).blocks
        assert len(tower.blocks) >= len(original) / 2
        assert tower.blocks[0].mlp.neurons == original[0].mlp.neurons
        assert all(block.mlp.neurons % 8 == 0 for block in tower.blocks)
        assert all(2 * block.attention.heads >= original[0].attention.heads for block in tower.blocks)
        assert all(2 * block.mlp.neurons >= original[0].mlp.neurons for block in tower.blocks)
    assert not {"vision.0", "text.0"} & record.plan["kept"]["heads"].keys()


def test_the_control_removes_as_much_of_the_same_kinds() -> None:
    control = SearchPrune(method="uvc", units=ALL).control()
    assert control is not None
    assert (control.method, control.units) == ("random", ALL)
    bundle, record = run("clip", method="random", units=ALL, ratio=0.3)
    assert record.facts["recount"] == record.plan["after"]
    before, after = (sum(costs["parameters"] for costs in record.plan[when].values()) for when in ("before", "after"))
    assert 0.7 * before - 97 <= after <= 0.7 * before
    assert record.plan["kept"]["blocks"]
    assert record.plan["kept"]["neurons"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bundle.model.modules())


def test_a_killed_search_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"method": "uvc", "units": ALL, "ratio": 0.3, "steps": 8, "save_minutes": 0.0}
    whole, record = run("clip", **given, more={"workdir": tmp_path / "one"})
    save = State.save
    # In the middle of the search, and when it is settled.
    for at in (3, 7):

        def stops(self: State, *values: Any, at: int = at) -> None:
            save(self, *values)
            if self.step == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(State, "save", stops)
        with pytest.raises(KeyboardInterrupt):
            run("clip", **given, more={"workdir": tmp_path / "two"})
    monkeypatch.setattr(State, "save", save)
    resumed, again = run("clip", **given, more={"workdir": tmp_path / "two"})
    assert again.plan == record.plan
    assert again.facts["search"] == record.facts["search"]
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
