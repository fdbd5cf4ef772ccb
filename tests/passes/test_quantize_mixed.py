"""quantize with scheme auto: budgets that hold, choices no worse than uniform ones, random controls, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes import quantize_mixed
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_layers import bytes_of
from mmcompress.pipeline import Stage, run_stage
from mmcompress.progress import Silent
from mmcompress.recipe import Step
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from tests import tiny
from tests.passes import decoding

FAMILY = "dual_encoder_dinov2"
MIB = 2**20
WIDTHS = {"W4A16": 4, "W8A16": 8}


class Talk(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run(bundle: Bundle | None = None, seed: int = 0, talk: Talk | None = None, **params: Any) -> tuple[Bundle, Plan]:
    bundle = bundle or tiny.bundle(FAMILY)
    data = Context(data=tiny.dataset(8), num_samples=8, batch_size=4, seed=seed, progress=talk or Talk())
    made = Quantize(**{"scheme": "auto", "group_size": 16, "min_cosine": -1.0, **params})
    made.check(bundle)
    plan = made.plan(bundle, data)
    made.apply(bundle, plan)
    return bundle, plan


def average_bits(plan: Plan, towers: tuple[str, ...] = ("vision", "text")) -> float:
    """Counted anew from the float model: the width of each layer's scheme, over all weights that quantize takes."""
    whole = tiny.bundle(FAMILY)
    _, everything = run(scheme="W8A16", towers=towers, sensitivity_samples=0)
    weights = {path: whole.module(path).weight.numel() for path in everything.decisions["layers"]}
    layers = plan.decisions["layers"]
    return sum(count * WIDTHS.get(layers.get(path), 32) for path, count in weights.items()) / sum(weights.values())


@pytest.mark.parametrize("bits", [4.6, 5, 6.5, 9, 20])
def test_bits_are_kept_by_recount(bits: float) -> None:
    _, plan = run(bits=bits)
    spent = average_bits(plan)
    assert spent <= bits
    assert plan.decisions["mixed"]["spent"] == pytest.approx(spent, abs=1e-4)


@pytest.mark.parametrize("assign", ["measured", "random"])
def test_bytes_are_kept_by_recount(assign: str) -> None:
    bundle = tiny.bundle(FAMILY)
    before = sum(bytes_of(bundle, tower) for tower in bundle.towers())
    allowed = 0.3 * before / MIB
    bundle, plan = run(bundle, size_mib=allowed, assign=assign)
    after = sum(bytes_of(bundle, tower) for tower in bundle.towers()) / MIB
    assert 0.25 * before / MIB < after <= allowed
    assert plan.decisions["mixed"]["spent"] == pytest.approx(after, abs=1e-4)


def test_saved_bytes_are_those_of_the_layers() -> None:
    bundle = tiny.bundle(FAMILY)
    before = sum(bytes_of(bundle, tower) for tower in bundle.towers())
    bundle, plan = run(bundle, bits=5)
    after = sum(bytes_of(bundle, tower) for tower in bundle.towers())
    reports = plan.decisions["towers"].values()
    assert before - after == sum(o["bytes_saved"] for report in reports for o in report["options"] if o["chosen"])


def test_no_other_choice_within_the_budget_has_smaller_losses() -> None:
    _, plan = run(bits=6, towers=("text",))
    options: dict[str, list[dict[str, Any]]] = {}
    for option in plan.decisions["towers"]["text"]["options"]:
        options.setdefault(option["layers"], []).append(option)
    chosen = {name: next(o for o in each if o["chosen"]) for name, each in options.items()}
    # By bytes saved, which grow with the bits saved: all that save as much or more lose as much or more.
    saved, lost = (sum(o[key] for o in chosen.values()) for key in ("bytes_saved", "loss"))
    assert len(list(options)) <= 8
    for other in itertools.product(*options.values()):
        if sum(o["bytes_saved"] for o in other) >= saved:
            assert sum(o["loss"] for o in other) >= lost - 1e-6


def test_more_bits_never_lose_more() -> None:
    losses = [run(bits=bits)[1].decisions["mixed"]["predicted_loss"] for bits in (4.6, 5, 6, 8, 12, 24)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 10 * losses[-1]


def test_it_measures_no_worse_than_any_uniform_scheme_of_the_budget() -> None:
    talk = Talk()
    _, plan = run(bits=9, talk=talk)
    mixed = plan.decisions["mixed"]
    assert set(mixed["uniform_loss"]) == {"W4A16", "W8A16"}
    assert mixed["kept"] == "auto"
    assert mixed["measured_loss"] < min(mixed["uniform_loss"].values())
    assert talk.said[0].startswith("auto: 1 - cosine ")
    assert set(run(bits=6)[1].decisions["mixed"]["uniform_loss"]) == {"W4A16"}


@pytest.mark.parametrize("bits", [8, 10])
def test_a_uniform_scheme_that_is_as_good_is_kept_and_said_first(bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Misled into everything at its smallest, it must see that 8 bits for all layers were within the budget too.
    monkeypatch.setattr(quantize_mixed, "best_choice", lambda groups, budget: [0] * len(groups))
    talk = Talk()
    _, plan = run(bits=bits, talk=talk)
    assert plan.decisions["mixed"]["kept"] == "uniform W8A16"
    assert talk.said[0].startswith("auto is no better than W8A16 for all layers: 1 - cosine ")
    assert set(plan.decisions["layers"].values()) == {"W8A16"}
    assert "groups" not in plan.decisions
    _, uniform = run(scheme="W8A16")
    assert set(plan.decisions["layers"]) == set(uniform.decisions["layers"])
    for tower, report in plan.decisions["towers"].items():
        assert report["cosine"] == pytest.approx(uniform.decisions["towers"][tower]["cosine"], abs=1e-6)


def test_the_smallest_choice_is_w4a16_and_no_better_than_it() -> None:
    talk = Talk()
    _, uniform = run(scheme="W4A16")
    _, plan = run(bits=4.51, talk=talk)
    assert plan.decisions["layers"] == uniform.decisions["layers"]
    assert plan.decisions["mixed"]["kept"] == "uniform W4A16"
    assert "no better" in talk.said[0]


def test_the_recorded_cosine_is_that_of_the_whole_choice() -> None:
    bundle, plan = run(bits=5, towers=("text",))
    floats = tiny.bundle(FAMILY)
    data = tiny.dataset(8).subset(8, 0)
    inputs = floats.prepare("text", [floats.items("text", sample)[0] for sample in data])
    with torch.inference_mode():
        ours, theirs = (each.encode("text", inputs).double() for each in (bundle, floats))
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=1).mean().item()
    assert plan.decisions["towers"]["text"]["cosine"] == pytest.approx(cosine, abs=2e-6)


@pytest.mark.parametrize("rounding", ["hqq", "gptq"])
def test_what_is_loaded_again_is_bit_equal(rounding: str, tmp_path: Path) -> None:
    params = {"scheme": "auto", "bits": 6, "group_size": 16, "min_cosine": -1.0, "rounding": rounding}
    bundle = tiny.bundle(FAMILY)
    stage = Stage(1, Step("quantize", params), passes.build("quantize", params))
    run_stage(bundle, stage, Context(data=tiny.dataset(8), num_samples=8, batch_size=4))
    assert {PackedLinear, QuantizedLinear} <= {type(module) for module in bundle.model.modules()}
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    for tower in bundle.towers():
        inputs = bundle.example_inputs(tower.name, 2)
        with torch.inference_mode():
            assert torch.equal(bundle.encode(tower.name, inputs), again.encode(tower.name, inputs))


@pytest.mark.parametrize("bits", [5.2, 8, 20])
def test_one_weight_that_two_layers_share_is_counted_once(bits: float) -> None:
    bundle = decoding.bundle()
    tower = bundle.tower("decoder")
    ((table, last),) = tower.tied
    vocabulary = bundle.module(table).weight.numel()
    made = Quantize(scheme="auto", bits=bits, group_size=16, towers=("decoder",), min_cosine=-1.0)
    plan = made.plan(bundle, Context(data=tiny.spoken(6), num_samples=6, batch_size=3, progress=Talk()))
    layers = plan.decisions["layers"]
    assert (table in layers) == (last in layers)
    options = {(o["layers"], o["scheme"]): o for o in plan.decisions["towers"]["decoder"]["options"]}
    assert not [name for name, _ in options if name == last]
    # Of 4 bytes each 1 is left, and a scale for each of its rows.
    assert options[table, "W8A16"]["bytes_saved"] == 3 * vocabulary - 4 * bundle.module(table).weight.shape[0]
    before = bytes_of(bundle, tower)
    made.apply(bundle, plan)
    assert before - bytes_of(bundle, tower) == sum(o["bytes_saved"] for o in options.values() if o["chosen"])


def test_one_tower_may_have_a_scheme_of_its_own() -> None:
    _, plan = run(bits=6, text_scheme="W8A16")
    assert plan.decisions["towers"]["text"]["scheme"] == "W8A16"
    assert plan.decisions["towers"]["vision"]["scheme"] == "AUTO"
    assert average_bits(Plan({"layers": plan.decisions["layers"]}), ("vision",)) <= 6


def test_tensorrt_gets_no_4_bits() -> None:
    bundle, plan = run(bits=10, target="tensorrt")
    assert set(plan.decisions["layers"].values()) == {"W8A16"}
    assert not [module for module in bundle.model.modules() if isinstance(module, PackedLinear)]


def test_the_control_draws_within_the_same_budget_and_judges_nothing() -> None:
    made = Quantize(scheme="auto", bits=6)
    control = made.control()
    assert control == Quantize(scheme="auto", bits=6, assign="random")
    assert control.control() is None
    assert Quantize().control() is None
    plans = [run(bits=6, assign="random", seed=seed)[1] for seed in (0, 0, 1, 2)]
    assert plans[0].decisions == plans[1].decisions
    assert len({json.dumps(plan.decisions["layers"]) for plan in plans}) == 3
    assert all(5.5 < average_bits(plan) <= 6 for plan in plans)
    assert not any("cosine" in report for plan in plans for report in plan.decisions["towers"].values())


def test_it_loses_less_than_what_is_drawn() -> None:
    def loss(**params: Any) -> float:
        bundle, _ = run(bits=6, towers=("text",), **params)
        floats = tiny.bundle(FAMILY)
        inputs = floats.prepare("text", [floats.items("text", sample)[0] for sample in tiny.dataset(8)])
        with torch.inference_mode():
            ours, theirs = (each.encode("text", inputs).double() for each in (bundle, floats))
        return 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=1).mean().item()

    drawn = [loss(assign="random", seed=seed) for seed in range(4)]
    assert loss() < sum(drawn) / len(drawn)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"scheme": "auto"}, "needs a budget"),
        ({"scheme": "auto", "bits": 5, "size_mib": 20}, "both bits and size_mib"),
        ({"scheme": "auto", "bits": 0}, "bits is 0; expected a number > 0"),
        ({"scheme": "auto", "size_mib": -1}, "size_mib is -1; expected a number > 0"),
        ({"scheme": "W8A16", "bits": 5}, "bits is for scheme auto, which no tower has"),
        ({"scheme": "W8A16", "assign": "random"}, "assign is for scheme auto"),
        ({"scheme": "auto", "bits": 5, "sensitivity_samples": 0}, "scheme auto decides by them"),
    ],
)
def test_parameters_that_contradict_are_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Quantize(**params)


def test_a_budget_that_is_too_small_says_the_least_and_that_works() -> None:
    with pytest.raises(UsageError, match=r"bits is 3; the least that vision and text can have is (4\.\d+)") as caught:
        run(bits=3)
    offered = float(caught.value.hint.split()[2])
    assert run(bits=offered)[1].decisions["layers"]
    with pytest.raises(UsageError, match="size_mib is 0.01; the least that vision and text can have is"):
        run(size_mib=0.01)


def test_a_budget_that_asks_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="every layer of vision and text may stay float"):
        run(bits=32)


def test_without_data_it_says_what_needs_some() -> None:
    with pytest.raises(UsageError, match="needs data"):
        Quantize(scheme="auto", bits=6, group_size=16).plan(tiny.bundle(FAMILY), Context())
    assert not Quantize(scheme="auto", bits=6).streams()


def test_a_cosine_below_the_limit_is_said() -> None:
    talk = Talk()
    run(bits=4.6, min_cosine=0.9999, talk=talk)
    assert any("below min_cosine 0.9999" in said for said in talk.said)
