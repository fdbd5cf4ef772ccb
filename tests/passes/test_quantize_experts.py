"""Experts as layers of `quantize`: what they become, what is reported, what is given back, and what reads them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.jobs.inspect import inspect
from mmcompress.measure.size import parameters
from mmcompress.passes.base import Context
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_judge import Judge
from mmcompress.recipe import Step
from mmcompress.surgery.experts import QuantizedExperts
from mmcompress.surgery.packed import PackedLinear
from tests import tiny, tiny_vlm

MODEL = "qwen3_vl_moe"
PATHS = [f"model.language_model.layers.{index}.mlp.experts" for index in (0, 2)]
WEIGHTS = 4 * (96 * 32 + 32 * 48)
"""Of a block's four experts, of 32 channels and 48 neurons."""


@pytest.fixture(autouse=True)
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons that groups of 16 divide."""
    monkeypatch.setitem(tiny_vlm.MIXED, "moe_intermediate_size", 48)


class Told:
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, *_: Any) -> None: ...
    def advance(self, *_: Any, **__: Any) -> None: ...
    def finish(self) -> None: ...


def context(data: bool = True, told: Told | None = None) -> Context:
    more: dict[str, Any] = {"progress": told} if told else {}
    return Context(data=tiny.data(MODEL, 8) if data else None, num_samples=8, batch_size=4, **more)


def run(bundle: Bundle, given: Context | None = None, **params: Any) -> dict[str, Any]:
    """Quantize the language model; return what is recorded."""
    params = {"towers": ("language",), "sensitivity_samples": 0, **params}
    pipeline.run_stage(
        bundle, pipeline.Stage(1, Step("quantize", params), passes.build("quantize", params)), given or context(False)
    )
    record = bundle.history[-1]
    return {"plan": record.plan, "facts": record.facts}


@torch.no_grad()
def output(bundle: Bundle) -> Tensor:
    return bundle.encode("language", bundle.example_inputs("language", 3))


def layers_of(recorded: dict[str, Any]) -> dict[str, str]:
    return {path: scheme for path, scheme in recorded["plan"]["layers"].items() if path in PATHS}


@pytest.mark.parametrize(
    ("params", "wanted", "rounding"),
    [
        ({"scheme": "W8A16"}, "W8A16", "nearest"),
        ({"scheme": "W8A8", "activations": "dynamic"}, "W8A16", "nearest"),
        ({"scheme": "W4A16", "group_size": 16}, "W4A16", "nearest"),
        ({"scheme": "W4A16", "rounding": "hqq"}, "W4A16", "hqq"),
        ({"scheme": "W4A16", "group_size": 0}, "W4A16", "nearest"),
        ({"scheme": "W4A16", "symmetric_experts": True, "rounding": "hqq"}, "W4A16", "nearest"),
        ({"scheme": "W4A8"}, "W4A8", "nearest"),
        ({"scheme": "FP8", "target": "cuda", "activations": "dynamic"}, "W8A16", "nearest"),
    ],
    ids=str,
)
def test_experts_become_integers_and_reload_bit_equal(
    tmp_path: Path, params: dict[str, Any], wanted: str, rounding: str
) -> None:
    bundle = tiny.bundle(MODEL)
    recorded = run(bundle, **params)
    assert layers_of(recorded) == dict.fromkeys(PATHS, wanted)
    assert recorded["plan"]["towers"]["language"]["experts"] == {"scheme": wanted, "rounding": rounding}
    assert "experts_left" not in recorded["facts"]
    assert all(isinstance(bundle.module(path), QuantizedExperts) for path in PATHS)
    given = output(bundle)
    assert torch.nn.functional.cosine_similarity(given.flatten(), output(tiny.bundle(MODEL)).flatten(), dim=0) > 0.99
    written = checkpoint.save(bundle, tmp_path / "small")
    assert not written.plain_transformers
    again = checkpoint.load(tmp_path / "small")
    state = bundle.model.state_dict()
    assert again.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    assert torch.equal(output(again), given)
    with pytest.raises(UsageError, match="quantized already"):
        Quantize(scheme="W8A16").check(again)


def test_bytes_and_parameters_are_counted_by_hand() -> None:
    """4 bits in groups of 16: half a byte a weight, 4 bytes of scale a group, and a row's zero points in whole bytes."""
    bundle = tiny.bundle(MODEL)
    before = parameters(bundle.model).elements
    run(bundle, scheme="W4A16", group_size=16)
    assert parameters(bundle.model).elements == before
    experts = bundle.module(PATHS[0])
    points = 4 * (96 * 1 + 32 * 2)
    assert parameters(experts).bytes == WEIGHTS // 2 + 4 * WEIGHTS // 16 + points
    assert parameters(experts).elements == WEIGHTS


def test_inspect_counts_what_a_token_meets(tmp_path: Path) -> None:
    """Two of four experts stay idle, in integers as in floats."""
    bundle = tiny.bundle(MODEL)
    run(bundle, scheme="W8A16")
    checkpoint.save(bundle, tmp_path / "small")
    language = next(tower for tower in inspect(str(tmp_path / "small"))["towers"] if tower["name"] == "language")
    assert (language["experts"], language["experts_per_token"], language["neurons"]) == ("4", "2", "48-144")
    assert language["parameters_idle_per_token"] == 2 * WEIGHTS // 2


def test_neurons_that_no_group_divides_take_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_vlm.MIXED, "moe_intermediate_size", 24)
    recorded = run(tiny.bundle(MODEL), scheme="W4A16", group_size=16)
    assert layers_of(recorded) == dict.fromkeys(PATHS, "W8A16")
    assert set(PATHS) <= set(recorded["plan"]["towers"]["language"]["eight_bit"])


def test_what_stays_float_is_told() -> None:
    bundle, told = tiny.bundle(MODEL), Told()
    recorded = run(bundle, context(told=told), scheme="W8A16", keep_float=(PATHS[0],))
    assert layers_of(recorded) == {PATHS[1]: "W8A16"}
    assert recorded["facts"]["experts_left"] == {"language": WEIGHTS}
    assert any(f"the experts of 1 of 2 blocks stay floats, {WEIGHTS:,} weights" in text for text in told.said)
    assert any("the experts of 1 blocks take W8A16, rounded by nearest" in text for text in told.said)


def test_samples_are_not_fitted_to_and_that_is_said() -> None:
    bundle, told = tiny.bundle(MODEL), Told()
    recorded = run(bundle, context(told=told), scheme="W4A16", rounding="gptq", scaling="awq")
    assert recorded["plan"]["towers"]["language"]["experts"] == {"scheme": "W4A16", "rounding": "hqq"}
    assert any("not fitted to samples, of which each sees few tokens" in text for text in told.said)
    stacks = {name for name in bundle.model.state_dict() if ".experts." in name}
    assert stacks
    assert not any("gain" in name for name in stacks)


def test_calibrated_inputs_leave_experts_weights_alone() -> None:
    recorded = run(tiny.bundle(MODEL), context(), scheme="W8A8")
    assert layers_of(recorded) == dict.fromkeys(PATHS, "W8A16")
    assert set(recorded["plan"]["layers"].values()) == {"W8A8", "W8A16"}


def punished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each block's experts cost a tenth in 4 bits, and a fiftieth in 8."""
    real = Judge.cosine

    def worse(self: Judge, modules: Any) -> float:
        held = [module for path, module in modules.items() if path in PATHS]
        return real(self, modules) - sum(0.1 if isinstance(each.down, PackedLinear) else 0.02 for each in held)

    monkeypatch.setattr(Judge, "cosine", worse)


def test_the_experts_of_a_block_are_judged_as_one_group_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is harmless: both blocks' go back to 8 bits, and nothing else does."""
    punished(monkeypatch)
    recorded = run(tiny.bundle(MODEL), context(), scheme="W4A16", sensitivity_samples=4, min_cosine=0.94)
    report = recorded["plan"]["towers"]["language"]
    assert set(report["given_8_bits"]) == set(PATHS)
    assert report["kept_float"] == []
    assert layers_of(recorded) == dict.fromkeys(PATHS, "W8A16")
    told = {option["layers"]: option for option in report["options"]}
    # Half a byte a weight, a scale a group, zero points, in the place of floats.
    assert told[PATHS[0]]["bytes_saved"] == 4 * WEIGHTS - (WEIGHTS // 2 + 4 * WEIGHTS // 16 + 4 * (96 + 32 * 2))
    assert "experts_left" not in recorded["facts"]


def test_experts_that_cost_too_much_in_eight_bits_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    punished(monkeypatch)
    recorded = run(tiny.bundle(MODEL), context(), scheme="W8A16", sensitivity_samples=4, min_cosine=0.97)
    (kept,) = recorded["plan"]["towers"]["language"]["kept_float"]
    assert layers_of(recorded) == {path: "W8A16" for path in PATHS if path != kept}
    assert recorded["facts"]["experts_left"] == {"language": WEIGHTS}


@pytest.mark.parametrize("assign", ["measured", "random"])
def test_a_budget_counts_experts(assign: str) -> None:
    recorded = run(tiny.bundle(MODEL), context(), scheme="auto", bits=6.0, assign=assign, sensitivity_samples=4)
    mixed = recorded["plan"]["mixed"]
    assert mixed["spent"] <= 6
    options = recorded["plan"]["towers"]["language"]["options"]
    own = [option for option in options if option["layers"] == PATHS[0]]
    assert [option["scheme"] for option in own] == ["W4A16", "W8A16", "W16A16"]
    saved = [
        4 * WEIGHTS - (WEIGHTS // 2 + 4 * WEIGHTS // 16 + 4 * (96 + 32 * 2)),
        4 * WEIGHTS - (WEIGHTS + 4 * 4 * 128),
    ]
    assert [option["bytes_saved"] for option in own] == [*saved, 0]
    assert sum(option["chosen"] for option in own) == 1


def test_symmetric_experts_are_refused_where_there_are_none() -> None:
    with pytest.raises(UsageError, match="no tower gets W4A16"):
        Quantize(scheme="W8A16", symmetric_experts=True)
    with pytest.raises(UsageError, match="the model has no experts"):
        Quantize(scheme="W4A16", symmetric_experts=True).check(tiny.bundle("clip"))
