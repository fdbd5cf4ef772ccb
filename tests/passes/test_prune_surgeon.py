"""Optimal brain surgeon on tiny models: what it foresees is what the repair leaves, and of two that say the same one stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.ops import reconstruction
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_effects import taylor
from mmcompress.passes.prune_repair import repaired_readers
from mmcompress.passes.prune_surgeon import surgeon
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.linears import spread
from tests import tiny
from tests.passes.test_prune_repair import readings, sensitivities
from tests.passes.test_prune_scores import context, groups_of


def group_of(bundle: Bundle, kind: str, tower: str = "vision", block: int = 0) -> Group:
    return next(g for g in groups_of(bundle) if (g.tower, g.kind, g.block) == (tower, kind, block))


@pytest.mark.parametrize(("kind", "count"), [("neurons", 20), ("heads", 2)])
def test_what_it_foresees_is_what_least_squares_leaves(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the refitted reader on calibration tokens, each counted by how much it moves the embedding."""
    monkeypatch.setattr(reconstruction, "shrinkage", lambda *_: 0.0)
    bundle, data = tiny.bundle("clip"), context(12, batch_size=12)
    group = group_of(bundle, kind)
    reader = bundle.module(group.reader)
    assert isinstance(reader, nn.Linear)
    (scores,) = surgeon(bundle, [group], data, ridge=0)
    order = scores.argsort().tolist()
    kept = sorted(order[count:])
    made = repaired_readers(bundle, {group: kept}, data, "least-squares", 1e-6)
    seen = readings(bundle, "vision", data, {group.reader: reader})[group.reader]
    weights = sensitivities(bundle, "vision", data, {group.reader: reader})[group.reader]
    columns = spread(torch.tensor(kept), group.width)
    with torch.no_grad():
        have = nn.functional.linear(seen[..., columns], made[f"{group.reader}.weight"], made[f"{group.reader}.bias"])
        errors = (have - reader(seen)).square().sum(-1) * weights
    measured = float(errors.sum()) / (12 * reader.out_features)
    assert float(scores[order[:count]].sum()) == pytest.approx(measured, rel=0.02)


def test_of_two_neurons_that_say_the_same_one_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "shrinkage", lambda *_: 0.0)
    bundle = tiny.bundle("clip")
    group = group_of(bundle, "neurons")
    up = bundle.module(group.writers[0])
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(up, name)[7] = getattr(up, name)[3]
    (scores,) = surgeon(bundle, [group], context(), ridge=1e-6)
    pair = scores[[3, 7]].sort().values
    assert pair[0] < 1e-3 * pair[1]
    assert pair[1] > 0.1 * scores.median()
    # First-order effects see both at their full worth.
    (blind,) = taylor(bundle, [group], context(), "embedding")
    assert blind[[3, 7]].min() > 1e-3 * blind[[3, 7]].max()


def test_it_speaks_taylors_currency() -> None:
    """A unit nothing else can stand in for costs by either score about what it does: within a factor over all of them."""
    bundle = tiny.bundle("clip")
    groups = groups_of(bundle)
    found = surgeon(bundle, groups, context(), 0.01)
    first_order = taylor(bundle, groups, context(), "embedding")
    shares = [float(ours.sum() / theirs.sum()) for ours, theirs in zip(found, first_order, strict=True)]
    assert all(0.02 < share < 5 for share in shares), shares


def test_a_reader_that_nothing_reads_is_worth_nothing() -> None:
    bundle = tiny.bundle("clip")
    group = group_of(bundle, "neurons", block=2)
    with torch.no_grad():
        bundle.module(group.reader).weight.zero_()  # type: ignore[union-attr, operator]
        bundle.module(group.reader).bias.zero_()  # type: ignore[union-attr, operator]
    (scores,) = surgeon(bundle, [group], context(), 0.01)
    assert scores.max() < 1e-12


def test_plans_with_it_are_repeated_exactly_and_change_nothing() -> None:
    bundle = tiny.bundle("clip")
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    made = Prune(score="obs", ratio=0.2)
    first, second = made.plan(bundle, context()), made.plan(bundle, context())
    assert first.decisions == second.decisions
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
