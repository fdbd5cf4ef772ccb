"""Distilling what is quantized: integers train, everything about how they are stored stays, and what has none is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.passes.base import Context
from mmcompress.passes.distill import Distill
from mmcompress.passes.distill_job import INTEGERS, integer_layers
from mmcompress.passes.distill_train import parameter_groups
from mmcompress.passes.quantize import Quantize
from mmcompress.pipeline import Stage, run_stage
from mmcompress.recipe import Step
from mmcompress.surgery.master_weights import Masters, holders
from mmcompress.surgery.quantized import QuantizedEmbedding
from tests import tiny
from tests.passes import fitting

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILY = "dual_encoder_dinov2"
QUICK: dict[str, Any] = {
    "train": INTEGERS, "batch_size": 8, "steps": 6, "learning_rate": 1e-3, "amp": False, "towers": ("vision",),
    "keep_worse": True,
}  # fmt: skip


def integers(family: str = FAMILY, **params: Any) -> Bundle:
    """A tiny model in 4 bits, a whole row on one grid where nothing else is said."""
    return fitting.run(tiny.bundle(family), fitting.context(family), **{"group_size": 0, **params})[0]


def context(family: str = FAMILY, count: int = 24, **more: Any) -> Context:
    return Context(data=tiny.data(family, count), teacher=lambda: tiny.bundle(family), **more)


def state(bundle: Bundle) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bundle.model.state_dict().items()}


def changed(before: dict[str, Tensor], bundle: Bundle) -> set[str]:
    return {name for name, value in bundle.model.state_dict().items() if not torch.equal(value, before[name])}


def layout(values: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (value.shape, value.dtype, value.nbytes) for name, value in values.items()}


@pytest.mark.parametrize(("family", "rate"), [(FAMILY, 3e-4), ("clip", 3e-4), ("whisper", 1e-4)])
def test_integers_that_train_come_closer_to_the_teacher(family: str, rate: float) -> None:
    settings = {**QUICK, "steps": 40, "batch_size": 12, "learning_rate": rate, "towers": ()}
    loss = {}
    for train in ("all", INTEGERS):
        bundle = integers(family, scheme="W4A16")
        before = state(bundle)
        facts = Distill(**{**settings, "train": train}).fit(bundle, context(family))
        loss[train] = facts["loss"]["after"]
        assert layout(state(bundle)) == layout(before)
        moved = {name for name in changed(before, bundle) if "weight_" in name.rpartition(".")[2]}
        assert bool(moved) == (train == INTEGERS)
        assert all(name.endswith(("weight_int4", "weight_int8")) for name in moved)
    assert loss[INTEGERS] < facts["loss"]["before"]
    assert loss[INTEGERS] < loss["all"]
    found = facts["quantized_weights"]
    assert found["count"] == sum(layer.weight_shape.numel() for layer in holders(bundle.model).values())
    assert found["from_teacher"] == 1.0
    assert 0 < found["changed"] < 1
    assert all(layer.master is None for layer in holders(bundle.model).values())


def test_what_is_reported_is_what_the_integers_give() -> None:
    bundle = integers()
    facts = Distill(**QUICK).fit(bundle, context())
    again = Distill(**{**QUICK, "steps": 1, "learning_rate": 1e-30}).fit(bundle, context())
    assert again["loss"]["before"] == facts["loss"]["after"]


def test_the_other_tower_and_every_grid_stay_bit_identical() -> None:
    bundle = integers()
    before = state(bundle)
    facts = Distill(**QUICK).fit(bundle, context())
    moved = changed(before, bundle)
    assert moved
    assert all(bundle.tower("vision").owns(name) for name in moved)
    assert not any(name.endswith(("weight_scale", "weight_zero_point", "input_gain")) for name in moved)
    assert facts["quantized_weights"]["count"] == sum(
        layer.weight_shape.numel() for path, layer in holders(bundle.model).items() if bundle.tower("vision").owns(path)
    )


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"rounding": "hqq"},
        {"rounding": "gptq"},
        {"rounding": "adaround", "scaling": "equalize"},
        {"scaling": "awq", "clip": True},
        {"scaling": "awq", "fold": False},
        {"scheme": "W8A8"},
        {"scheme": "W8A8", "activations": "dynamic", "reduce_range": True},
        {"scheme": "W4A8"},
        {"scheme": "FP8", "target": "cuda"},
    ],
)
def test_no_steps_change_no_bit(params: dict[str, Any]) -> None:
    bundle = fitting.run(fitting.spread(), fitting.context(), **params)[0]
    before = state(bundle)
    inputs = bundle.example_inputs("vision", 2)
    wanted = bundle.encode("vision", inputs)
    masters = Masters.of(integer_layers(bundle, ("vision", "text")), fitting.spread().model)
    with masters.training():
        assert torch.equal(bundle.encode("vision", inputs), wanted)
    assert not changed(before, bundle)
    assert layout(state(bundle)) == layout(before)
    if not params:
        assert masters.given == masters.count  # the nearest integers are those of the floats
    assert Distill(train=INTEGERS, steps=0).fit(bundle, Context()) == {"steps": 0}
    assert not changed(before, bundle)


def test_the_plan_counts_what_will_train_and_changes_nothing() -> None:
    bundle = integers()
    before = state(bundle)
    facts = {train: Distill(**{**QUICK, "train": train}).plan(bundle, context()) for train in ("all", INTEGERS)}
    counts = {train: plan.decisions["trained_parameters"] for train, plan in facts.items()}
    layers = integer_layers(bundle, ("vision",))
    assert counts[INTEGERS] - counts["all"] == sum(layer.weight_shape.numel() for layer in layers.values())
    assert not changed(before, bundle)
    assert layout(state(bundle)) == layout(before)


def test_the_same_seed_gives_the_same_bits() -> None:
    made = []
    for seed in (0, 0, 1):
        bundle = integers()
        Distill(**QUICK).fit(bundle, context(seed=seed))
        made.append(state(bundle))
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    assert any(not torch.equal(value, made[2][name]) for name, value in made[0].items())


def test_half_precision_trains_in_full_and_stays_half() -> None:
    bundle = integers()
    bundle.model.bfloat16()
    before = state(bundle)
    facts = Distill(**QUICK).fit(bundle, context())
    assert layout(state(bundle)) == layout(before)
    moved = changed(before, bundle)
    assert any(name.endswith("weight_int4") for name in moved)
    assert not any(name.endswith("weight_scale") for name in moved)
    assert facts["quantized_weights"]["from_teacher"] > 0.9  # all but those that rounded scales send elsewhere


def test_tables_do_not_decay() -> None:
    bundle = integers(scheme="W8A16")
    masters = Masters.of(integer_layers(bundle, ("text",)), nn.Module())
    with masters.training():
        parameters = {name: value for name, value in bundle.model.named_parameters() if "master" in name}
        decayed, rest = parameter_groups(bundle.model, parameters, 0.01)
        tables = [each.master for each in bundle.model.modules() if isinstance(each, QuantizedEmbedding)]
    assert {id(value) for value in rest["params"]} == {id(table) for table in tables} != set()  # type: ignore[attr-defined]
    assert len(decayed["params"]) == len(parameters) - len(tables)  # type: ignore[arg-type]


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmcompress.passes.distill_train.Trainer._steps", interrupted)
    bundle = integers()
    before = state(bundle)
    with pytest.raises(KeyboardInterrupt):
        Distill(**QUICK).fit(bundle, context())
    assert layout(state(bundle)) == layout(before)
    assert not changed(before, bundle)


def stage(number: int, name: str, made: Any) -> Stage:
    return Stage(number, Step(name, {k: v for k, v in vars(made).items() if v != getattr(type(made), k)}), made)


def test_the_artifact_is_that_of_a_model_that_was_only_quantized(tmp_path: Path) -> None:
    bundle = tiny.bundle(FAMILY)
    quantize = Quantize(scheme="W4A16", target="openvino", group_size=16, min_cosine=-1.0, sensitivity_samples=0)
    run_stage(bundle, stage(1, "quantize", quantize), context())
    plain = copy.deepcopy(bundle)
    run_stage(bundle, stage(2, "distill", Distill(**{**QUICK, "towers": ()})), context())
    for name, each in (("plain", plain), ("trained", bundle)):
        checkpoint.save(each, tmp_path / name)
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "trained")]
    assert files[0].stat().st_size == files[1].stat().st_size
    assert files[0].read_bytes() != files[1].read_bytes()
    again = checkpoint.load(tmp_path / "trained")
    assert list(again.model.state_dict()) == list(plain.model.state_dict())
    assert not changed(state(bundle), again)
    # It raises where the graph differs from torch, or where a layer is not stored as it was promised.
    exports = {
        name: export_onnx(each, tmp_path / f"{name}-onnx", towers=["vision"], batches=(1, 2))
        for name, each in (("plain", plain), ("trained", again))
    }
    (old,), (new,) = (report.components for report in exports.values())
    assert new.component.nodes == old.component.nodes
    assert new.component.nodes["MatMulNBits"] > 0
    assert new.component.weights == old.component.weights
    assert max(row.relative for row in new.parity) <= 1e-4


def test_what_is_not_quantized_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer of vision is quantized") as error:
        Distill(**QUICK).plan(tiny.bundle(FAMILY), context())
    assert "quantize first" in error.value.hint
    with pytest.raises(UsageError, match="no layer of text is quantized"):
        Distill(**{**QUICK, "towers": ("text",)}).fit(integers(towers=("vision",)), context())
    Distill(**QUICK).check(tiny.bundle(FAMILY))  # a step before may quantize it


def test_float_codes_are_refused() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'mmcompress[bnb]'")
    pytest.importorskip("accelerate", reason="pip install 'mmcompress[bnb]'")
    from tests.passes.test_quantize_float_codes import run
    from tests.tiny import wide

    bundle = run(wide(), scheme="NF4", text_scheme="W4A16")
    with pytest.raises(UsageError, match=r"bitsandbytes' \(NF4, FP4\): its codes and their scales") as error:
        integer_layers(bundle, ("vision", "text"))
    assert "distill.towers" in error.value.hint
    assert integer_layers(bundle, ("text",))
