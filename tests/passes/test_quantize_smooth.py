"""How strongly W8A8 is smoothed where nobody says so: what keeps most on samples that ranges were not taken from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmcompress.bundle import Bundle
from mmcompress.passes import quantize_smooth
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_calibrate import Seen, look
from mmcompress.passes.quantize_judge import Judge
from mmcompress.passes.quantize_smooth import STRENGTHS, USUAL
from tests import tiny

FAMILY = "dual_encoder_vit"


def planned(bundle: Bundle, samples: int = 8, **params: Any) -> Plan:
    context = Context(data=tiny.data(FAMILY, 12), num_samples=samples, batch_size=4)
    return Quantize(**{"towers": ("vision",), "min_cosine": -1.0, **params}).plan(bundle, context)


def report(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = plan.decisions["towers"]["vision"]
    return found


def test_the_best_of_those_tried_is_taken_with_the_ranges_of_all_samples() -> None:
    bundle = tiny.bundle(FAMILY)
    with torch.no_grad():
        for block in bundle.tower("vision").blocks:
            bundle.module(block.norms[1]).weight[::7] *= 60  # type: ignore[index]
    plan = planned(bundle)
    tried = report(plan)["smooth_tried"]
    assert set(tried) == {f"{strength:g}" for strength in STRENGTHS}
    assert len(set(tried.values())) > 3
    assert tried[f"{report(plan)['smooth']:g}"] == max(tried.values())
    given = planned(bundle, smooth=report(plan)["smooth"])
    assert "smooth_tried" not in report(given)
    assert plan.tensors.keys() == given.tensors.keys()
    for name, tensor in given.tensors.items():  # batches of other sizes leave other last bits
        torch.testing.assert_close(plan.tensors[name], tensor, rtol=1e-4, atol=0)


def test_what_is_judged_on_was_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids that are tried are those of other samples; the same pictures, in batches of other sizes, are seen in the end."""
    looked: list[list[str]] = []
    judged: list[list[str]] = []

    def keys(context: Context) -> list[str]:
        assert context.data is not None
        return [sample.key for sample in context.data.subset(context.num_samples, context.seed)]

    def noted(bundle: Bundle, tower: Any, seen: Seen, context: Context) -> None:
        looked.append(keys(context))
        look(bundle, tower, seen, context)

    class Noted(Judge):
        def __init__(self, bundle: Bundle, tower: str, context: Context, samples: int) -> None:
            assert len(looked) == 1
            judged.append(keys(context))
            super().__init__(bundle, tower, context, samples)

    monkeypatch.setattr(quantize_smooth, "look", noted)
    monkeypatch.setattr(quantize_smooth, "Judge", Noted)
    planned(tiny.bundle(FAMILY))
    others, few = looked
    assert judged == [few]
    assert (len(others), len(few)) == (6, 2)  # a quarter at most
    assert set(others) | set(few) == set(keys(Context(data=tiny.data(FAMILY, 12), num_samples=8)))


@pytest.mark.parametrize("params", [{"sensitivity_samples": 0}, {"samples": 3}, {"observer": "mse"}])
def test_without_samples_to_hold_back_it_is_the_usual_one(params: dict[str, Any]) -> None:
    plan = planned(tiny.bundle(FAMILY), **params)
    assert report(plan)["smooth"] == USUAL
    assert "smooth_tried" not in report(plan)


def test_a_linear_that_shares_a_tables_weight_is_left_out() -> None:
    """Whisper's output layer: it has no gain, and is not made without its table."""
    bundle = tiny.bundle("whisper")
    context = Context(data=tiny.data("whisper", 12), num_samples=8, batch_size=4)
    plan = Quantize(min_cosine=-1.0).plan(bundle, context)
    for tower in bundle.towers():
        tried = plan.decisions["towers"][tower.name]["smooth_tried"]
        assert all(0.9 < cosine <= 1 for cosine in tried.values())


def test_where_each_token_has_a_grid_nothing_is_searched() -> None:
    plan = planned(tiny.bundle(FAMILY), activations="dynamic")
    assert set(plan.decisions["scaled"].values()) == {USUAL}
    assert "smooth" not in report(plan)


def test_floats_of_8_bits_are_not_smoothed() -> None:
    plan = planned(tiny.bundle(FAMILY), scheme="FP8", target="cuda")
    assert not [name for name in plan.tensors if name.endswith(".gain")]
    assert "smooth" not in report(plan)


def test_time_is_forecast_for_what_is_searched() -> None:
    bundle, work = tiny.bundle(FAMILY), Work(samples=64, dataset=64, forward=1.0)
    seconds = {
        name: Quantize(**params).seconds(bundle, work)
        for name, params in {
            "searched": {},
            "given": {"smooth": 0.5},
            "dynamic": {"activations": "dynamic"},
            "dynamic, given": {"activations": "dynamic", "smooth": USUAL},
        }.items()
    }
    assert seconds["searched"] == seconds["given"] + 2 * len(STRENGTHS) * 16
    assert seconds["dynamic"] == seconds["dynamic, given"]
