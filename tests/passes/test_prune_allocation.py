"""How a budget is shared out: the same everywhere, or by trying; and what is said of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Plan
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_budget import pools
from mmcompress.passes.prune_evolution import Damage
from mmcompress.passes.prune_ranking import ranked
from mmcompress.passes.prune_units import Group, read_ranges
from tests import tiny
from tests.passes import decoding
from tests.passes.test_prune_scores import context, groups_of

TRIED = Prune(ratio=0.2, allocate="evolutionary", evaluations=12, judging_samples=4)


def kept_of(groups: list[Group], plan: Plan) -> dict[Group, list[int]]:
    kept = plan.decisions["kept"]
    return {g: read_ranges(kept[g.kind].get(g.key, f"0-{g.units - 1}")) for g in groups}


def turned(bundle: Bundle, cut: Bundle, towers: tuple[str, ...]) -> float:
    """1 - cosine of what two models make of the calibration samples, summed up over towers."""
    data = context().data
    assert data is not None
    total = 0.0
    for tower in towers:
        items = [item for index in range(6) for item in bundle.items(tower, data.subset(6, 0)[index])]
        with torch.no_grad():
            rows = [each.encode(tower, each.prepare(tower, items)).double() for each in (bundle, cut)]
        total += float((1 - torch.cosine_similarity(*rows)).mean())
    return total


@pytest.mark.parametrize("compensate", ["none", "bias"])
@pytest.mark.parametrize("family", ["clip", "dual_encoder_dinov2"])
def test_damage_is_that_of_the_model_that_is_really_cut(family: str, compensate: Any) -> None:
    bundle, cut = tiny.bundle(family), tiny.bundle(family)
    made = Prune(ratio=0.3, score="random", compensate=compensate)
    plan = made.plan(bundle, context())
    made.apply(cut, plan)
    groups = groups_of(bundle)
    damage = Damage(bundle, groups, context(), means=compensate == "bias")
    assert damage({group: list(range(group.units)) for group in groups}) == pytest.approx(0, abs=1e-7)
    found = damage(kept_of(groups, plan))
    assert found == pytest.approx(turned(bundle, cut, ("vision", "text")), rel=1e-3)
    assert found > 1e-4
    assert not any(module._forward_pre_hooks for module in bundle.model.modules())


def test_evolution_is_never_worse_than_the_plain_allocations_and_stays_within_the_budget() -> None:
    bundle = tiny.bundle("clip")
    # What little the first-order effects know of it: heads that matter look as if they did not.
    plans = {how: dataclasses.replace(TRIED, allocate=how).plan(bundle, context()) for how in ("knapsack", "even")}  # type: ignore[arg-type]
    found = TRIED.plan(bundle, context())
    (search,) = found.facts["search"]
    groups = groups_of(bundle)
    damage = Damage(bundle, groups, dataclasses.replace(context(), num_samples=4), means=True)
    measured = {how: damage(kept_of(groups, plan)) for how, plan in plans.items()}
    assert search["damage of knapsack"] == pytest.approx(measured["knapsack"])
    assert search["damage of even"] == pytest.approx(measured["even"])
    assert search["damage"] == pytest.approx(damage(kept_of(groups, found)))
    assert search["damage"] <= min(measured.values())
    before, after = (sum(c["parameters"] for c in found.decisions[key].values()) for key in ("before", "after"))
    assert 0.2 * before <= before - after < 0.22 * before
    assert TRIED.plan(bundle, context()).decisions == found.decisions
    assert (search["towers"], search["evaluations"]) == (["text", "vision"], 12)


def test_towers_with_budgets_of_their_own_are_searched_apart() -> None:
    bundle = decoding.bundle()
    made = dataclasses.replace(TRIED, ratio=0.1, ratios={"audio": 0.2}, evaluations=3)
    made.check(bundle)
    plan = made.plan(bundle, decoding.context())
    assert [each["towers"] for each in plan.facts["search"]] == [["audio"], ["decoder"]]
    made.apply(bundle, plan)
    assert made.fit(bundle, decoding.context())["recount"] == plan.decisions["after"]


def test_evenly_every_group_gives_up_the_same_share() -> None:
    bundle = tiny.bundle("clip")
    plan = Prune(ratio=0.2, allocate="even", multiple=1, score="magnitude", compensate="none").plan(bundle, context())
    shares = {g.key + g.kind: 1 - len(units) / g.units for g, units in kept_of(groups_of(bundle), plan).items()}
    heads = {share for key, share in shares.items() if key.endswith("heads")}
    neurons = [share for key, share in shares.items() if key.endswith("neurons")]
    assert heads == {0.25}
    assert max(neurons) - min(neurons) <= 1 / 64
    # Scores still say which units of a group go.
    magnitude = Prune(ratio=0.2, multiple=1, score="magnitude", compensate="none")
    groups = groups_of(bundle)
    totals = magnitude.survey(bundle, bundle.towers())[0]
    (pool,) = pools({name: costs.parameters for name, costs in totals.items()}, 0.2, None, {})
    assert pool.towers == ("vision", "text")
    for group, scores in zip(groups, ranked(magnitude, bundle, groups, context()), strict=True):
        kept = kept_of(groups, plan)[group]
        gone = sorted(set(range(group.units)) - set(kept))
        assert scores[gone].max() <= scores[kept].min()


def test_the_split_adds_up_to_what_went() -> None:
    bundle = decoding.bundle()
    plan = Prune(ratio=0.3, score="magnitude", compensate="none").plan(bundle, decoding.context())
    rows = plan.facts["split"]
    assert [(row["tower"], row["kind"]) for row in rows] == [
        ("audio", "heads"), ("audio", "neurons"), ("decoder", "heads"), ("decoder", "cross heads"), ("decoder", "neurons"),
    ]  # fmt: skip
    for tower in ("audio", "decoder"):
        for cost in ("parameters", "macs"):
            gone = plan.decisions["before"][tower][cost] - plan.decisions["after"][tower][cost]
            assert gone == sum(row[cost] for row in rows if row["tower"] == tower)
    assert all(row["share"] == pytest.approx(1 - row["after"] / row["before"], abs=1e-6) for row in rows)
    assert any(row["share"] for row in rows)


def test_its_control_is_random_and_needs_no_search() -> None:
    twin = TRIED.control()
    assert twin is not None
    assert (twin.score, twin.allocate) == ("random", "knapsack")
    balanced = Prune(score="activation", balance=True).control()
    assert balanced == Prune(score="random")


def test_a_budget_of_nothing_searches_nothing() -> None:
    plan = dataclasses.replace(TRIED, ratio=0.0).plan(tiny.bundle("clip"), context())
    assert "search" not in plan.facts
    assert {row["share"] for row in plan.facts["split"]} == {0}
