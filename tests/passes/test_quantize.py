"""The pass quantize: schemes per tower, grids, sensitivity, the way back to float; the general laws are in test_laws."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.rounding import UINT8, smoothing
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_calibrate import calibrate
from mmcompress.passes.quantize_judge import groups_of
from mmcompress.surgery.quantized import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear
from mmcompress.surgery.quantized_base import Quantized
from tests import tiny

FAMILY = "dual_encoder_dinov2"


def context(**more: Any) -> Context:
    return Context(data=tiny.dataset(8), num_samples=8, batch_size=4, **more)


def run(family: str = FAMILY, **params: Any) -> tuple[Bundle, Plan]:
    bundle = tiny.bundle(family)
    made = Quantize(**params)
    made.check(bundle)
    plan = made.plan(bundle, context())
    made.apply(bundle, plan)
    return bundle, plan


def layers(bundle: Bundle, tower: str) -> dict[str, Any]:
    owner = bundle.tower(tower)
    return {p: m for p, m in bundle.model.named_modules() if owner.owns(p) and isinstance(m, Quantized)}


def test_schemes_are_per_tower() -> None:
    bundle, plan = run(scheme="W8A8", text_scheme="w8a16", min_cosine=-1.0)
    assert {m.input_scale is not None for m in layers(bundle, "vision").values()} == {True}
    assert {m.input_scale is None for m in layers(bundle, "text").values()} == {True}
    assert {type(m) for m in layers(bundle, "vision").values()} == {QuantizedLinear, QuantizedConv2d}
    assert {type(m) for m in layers(bundle, "text").values()} == {QuantizedLinear, QuantizedEmbedding}
    assert set(plan.decisions["layers"].values()) == {"W8A8", "W8A16"}
    assert plan.decisions["towers"]["vision"]["kept_float"] == []


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("cpu", torch.uint8), ("openvino", torch.int8), ("cuda", torch.int8), ("tensorrt", torch.int8)],
)
def test_targets_choose_the_grid_of_activations(target: Any, dtype: torch.dtype) -> None:
    bundle, _ = run(target=target, towers=("vision",), sensitivity_samples=0)
    zeros = [m.input_zero_point for m in layers(bundle, "vision").values()]
    assert {zero.dtype for zero in zeros} == {dtype}
    assert any(int(zero) for zero in zeros) == (dtype == torch.uint8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("observer", ["min-max", "percentile", "mse"])
def test_layers_that_read_one_input_share_its_grid(family: str, observer: Any) -> None:
    bundle, _ = run(family, observer=observer, sensitivity_samples=0, fold=False)
    for tower in bundle.towers():
        for block in tower.blocks:
            q, k, v = (bundle.module(path) for path in block.attention.writers)
            for name in ("input_scale", "input_zero_point", "input_gain"):
                assert torch.equal(getattr(q, name), getattr(k, name))
                assert torch.equal(getattr(q, name), getattr(v, name))


def test_min_max_covers_what_calibration_saw() -> None:
    bundle = tiny.bundle(FAMILY)
    tower = bundle.tower("vision")
    path = tower.blocks[0].mlp.reader
    grid = calibrate(bundle, tower, [path], UINT8, context(), method="min-max", percentile=0, smooth=0.0)[path]
    seen: list[torch.Tensor] = []
    handle = bundle.module(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    bundle.embed("vision", tiny.images(8))
    handle.remove()
    everything = torch.cat([part.flatten() for part in seen])
    low, high = everything.min().clamp_max(0), everything.max()
    assert grid.scale.item() == pytest.approx(((high - low) / 255).item(), rel=1e-5)
    assert grid.gain is None


def test_gains_are_the_smoothing_of_all_weights_that_read_one_input() -> None:
    bundle = tiny.bundle(FAMILY)
    tower = bundle.tower("vision")
    writers = tower.blocks[0].attention.writers
    weights = [bundle.module(path).weight for path in writers]
    with torch.no_grad():
        weights[2][:, 5] = 20.0  # type: ignore[index]
    seen: list[torch.Tensor] = []
    handle = bundle.module(writers[0]).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    bundle.embed("vision", tiny.images(8))
    handle.remove()
    largest = torch.cat([part.flatten(0, -2) for part in seen]).abs().amax(0)
    together = torch.cat([weight.detach() for weight in weights]).abs().amax(0)
    settings = {"method": "min-max", "percentile": 0, "smooth": 0.5}
    grids = calibrate(bundle, tower, writers, UINT8, context(), **settings)  # type: ignore[arg-type]
    for path in writers:
        gain = grids[path].gain
        assert gain is not None
        torch.testing.assert_close(gain, 1 / smoothing(largest, together, 0.5), rtol=1e-4, atol=0)


def test_clipping_nothing_is_min_max_of_the_smoothed_input() -> None:
    bundle = tiny.bundle(FAMILY)
    tower = bundle.tower("vision")
    paths = [tower.blocks[1].mlp.reader]
    grids = [
        calibrate(bundle, tower, paths, UINT8, context(), method=method, percentile=100, smooth=0.5)[paths[0]]
        for method in ("min-max", "percentile")
    ]
    torch.testing.assert_close(grids[0].scale, grids[1].scale)
    assert torch.equal(grids[0].zero_point, grids[1].zero_point)


def test_padding_has_no_say_in_the_grids() -> None:
    """Texts of a batch are padded to the longest: one at a time there is no padding."""
    bundle = tiny.bundle(FAMILY)
    tower = bundle.tower("text")
    with torch.no_grad():
        # One channel far above all others, even after the norm, for the padding token alone.
        bundle.module("text_model.embeddings.word_embeddings").weight[0, 3] = 1e3  # type: ignore[index]
    paths = [path for block in tower.blocks for path in (*block.attention.writers, block.mlp.reader)]
    batched, single = (
        calibrate(bundle, tower, paths, UINT8, given, method="min-max", percentile=0, smooth=0.0)
        for given in (context(), dataclasses.replace(context(), batch_size=1))
    )
    for path in paths:
        torch.testing.assert_close(batched[path].scale, single[path].scale, rtol=1e-4, atol=0)


def test_smoothing_lowers_the_error_where_channels_differ() -> None:
    bundle = tiny.bundle(FAMILY)
    tower = bundle.tower("vision")
    with torch.no_grad():
        for block in tower.blocks:
            bundle.module(f"{block.path}.norm2").weight[::7] *= 60
    inputs = bundle.prepare("vision", tiny.images(8))
    want = bundle.encode("vision", inputs).detach()
    errors = {}
    for smooth in (0.0, 0.75):
        made = Quantize(towers=("vision",), smooth=smooth, sensitivity_samples=0)
        copy = tiny.bundle(FAMILY)
        copy.model.load_state_dict(bundle.model.state_dict())
        made.apply(copy, made.plan(copy, context()))
        errors[smooth] = (copy.encode("vision", inputs).detach() - want).square().mean().item()
    assert errors[0.75] < 0.7 * errors[0.0]


def test_sensitivity_names_every_group_and_what_all_cost() -> None:
    _, plan = run(towers=("vision",), min_cosine=-1.0, sensitivity=True)
    report = plan.decisions["towers"]["vision"]
    blocks = [f"vision_model.encoder.layer.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]
    assert {*blocks, "visual_projection"} < set(report["sensitivity"])
    assert report["cosine"] == report["cosine_all_quantized"]
    # The float model, each group alone, all together.
    assert report["judged_on"] == {"samples": 8, "runs": len(report["sensitivity"]) + 2}
    assert max(report["sensitivity"].values()) <= (1 - report["cosine"]) * 1.5


def test_groups_are_judged_alone_only_where_one_has_to_go_back() -> None:
    _, plan = run(towers=("vision",), min_cosine=-1.0)
    report = plan.decisions["towers"]["vision"]
    assert (report["sensitivity"], report["kept_float"]) == ({}, [])
    assert report["judged_on"] == {"samples": 8, "runs": 2}


def test_the_worst_groups_go_back_to_float_until_the_limit_holds() -> None:
    _, everything = run(towers=("vision",), min_cosine=-1.0, sensitivity=True)
    free = everything.decisions["towers"]["vision"]
    limit = (1 + free["cosine"]) / 2
    bundle, plan = run(towers=("vision",), min_cosine=limit)
    report = plan.decisions["towers"]["vision"]
    assert report["cosine"] >= limit > report["cosine_all_quantized"]
    worst = max(free["sensitivity"], key=lambda name: free["sensitivity"][name])
    paths = groups_of(bundle.tower("vision"), list(everything.decisions["layers"]))[worst]
    assert set(paths) <= set(report["kept_float"])
    assert not set(report["kept_float"]) & set(layers(bundle, "vision"))
    assert layers(bundle, "vision")


def test_a_limit_out_of_reach_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer of the vision tower can be quantized within min_cosine"):
        run(towers=("vision",), min_cosine=1 - 1e-12)


def test_bytes_shrink_as_promised() -> None:
    bundle, plan = run(min_cosine=-1.0)
    facts = Quantize().fit(bundle, context())
    state = bundle.model.state_dict()
    for tower in bundle.towers():
        own = {name: value for name, value in state.items() if tower.owns(name)}
        assert facts["bytes"][tower.name] == sum(value.nbytes for value in own.values())
        saved = sum(3 * value.nbytes for name, value in own.items() if name.endswith("weight_int8"))
        added = sum(value.nbytes for name, value in own.items() if name.endswith(("_scale", "_zero_point", "_gain")))
        assert facts["bytes"][tower.name] == plan.decisions["towers"][tower.name]["bytes_before"] - saved + added


def test_kept_layers_stay() -> None:
    bundle, plan = run(keep_float=("vision_model.encoder.layer.0.*", "visual_projection"), min_cosine=-1.0)
    assert not any(path.startswith("vision_model.encoder.layer.0.") for path in layers(bundle, "vision"))
    assert "visual_projection" not in plan.decisions["layers"]
    assert "vision_model.encoder.layer.1.mlp.fc1" in plan.decisions["layers"]


def test_tables_can_stay_float() -> None:
    bundle, _ = run(towers=("text",), embeddings=False, min_cosine=-1.0)
    assert not any(isinstance(module, QuantizedEmbedding) for module in bundle.model.modules())


def test_tables_too_small_to_matter_stay_float() -> None:
    bundle = tiny.bundle("dual_encoder_vit")
    settings = Quantize(scheme="W8A16")
    settings.apply(bundle, settings.plan(bundle, Context()))
    at = "text_model.embeddings"
    assert isinstance(bundle.module(f"{at}.word_embeddings"), QuantizedEmbedding)
    # 2 rows of 32, less than a hundredth of the tower.
    assert type(bundle.module(f"{at}.token_type_embeddings")) is nn.Embedding


def test_weights_alone_need_no_data() -> None:
    bundle = tiny.bundle(FAMILY)
    made = Quantize(scheme="W8A16")
    plan = made.plan(bundle, Context())
    assert plan.tensors == {}
    made.apply(bundle, plan)
    assert layers(bundle, "vision")
    assert layers(bundle, "text")


def test_seven_bits() -> None:
    bundle, _ = run(reduce_range=True, min_cosine=-1.0)
    assert max(int(m.weight_int8.abs().max()) for m in layers(bundle, "vision").values()) == 63


def test_activations_need_data_of_their_kind() -> None:
    with pytest.raises(UsageError, match="quantizing the activations of the vision tower needs data"):
        Quantize().plan(tiny.bundle(FAMILY), Context())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"scheme": "W3A9"},
            "quantize.scheme is 'W3A9'; known schemes: W8A8, W8A16, W4A16, W4A8, FP8, MXFP4, NVFP4, NF4, FP4, W16A16, AUTO",
        ),
        ({"vision_scheme": "int8"}, "quantize.vision_scheme is 'int8'"),
        ({"percentile": 0.0}, "expected 0 < percentile <= 100"),
        ({"min_cosine": 1.0}, "expected -1 <= min_cosine < 1"),
        ({"smooth": 1.5}, "quantize.smooth is 1.5; expected 0 <= smooth <= 1"),
        ({"sensitivity_samples": -1}, "expected 0 or more"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(**params)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"towers": ("audio",)}, "has no tower 'audio'"),
        ({"towers": ("text",), "vision_scheme": "W8A16"}, "quantize.towers does not name"),
        ({"keep_float": ("vision_model.layers.99.*",)}, "matches no layer"),
    ],
)
def test_what_check_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Quantize(**params).check(tiny.bundle(FAMILY))


def test_a_tower_is_quantized_once() -> None:
    bundle, _ = run(towers=("vision",), sensitivity_samples=0)
    with pytest.raises(UsageError, match="the vision tower is quantized already"):
        Quantize().check(bundle)
    Quantize(towers=("text",)).check(bundle)
    Quantize(vision_scheme="W16A16").check(bundle)
