"""quantize with W4A16: which layers take 4 bits, how they are rounded, what is given back; the general laws are in test_laws."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.gptq import output_error
from mmcompress.passes import quantize_moments
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_layers import told
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear, TiedLinear
from mmcompress.surgery.watch import Sums
from tests import tiny
from tests.passes import decoding

FAMILY = "dual_encoder_dinov2"


def context(count: int = 8, **more: Any) -> Context:
    return Context(data=tiny.dataset(count), num_samples=count, batch_size=4, **more)


def run(bundle: Bundle | None = None, data: Context | None = None, **params: Any) -> tuple[Bundle, Plan]:
    bundle = bundle or tiny.bundle(FAMILY)
    made = Quantize(**{"scheme": "W4A16", "min_cosine": -1.0, **params})
    made.check(bundle)
    plan = made.plan(bundle, data or Context())
    made.apply(bundle, plan)
    return bundle, plan


def packed(bundle: Bundle) -> dict[str, PackedLinear]:
    return {path: module for path, module in bundle.model.named_modules() if isinstance(module, PackedLinear)}


def test_linears_take_4_bits_and_all_else_8_and_the_report_says_so() -> None:
    bundle, plan = run(group_size=16)
    assert {type(bundle.module(path)) for path in plan.decisions["groups"]} == {PackedLinear}
    others = {path: module for path, module in bundle.model.named_modules() if path in plan.decisions["layers"]}
    eight = {path for path, module in others.items() if not isinstance(module, PackedLinear)}
    assert {type(others[path]) for path in eight} == {QuantizedConv2d, QuantizedEmbedding}
    reported = [path for tower in plan.decisions["towers"].values() for path in tower["eight_bit"]]
    assert set(reported) == eight
    assert set(plan.decisions["layers"].values()) == {"W4A16", "W8A16"}


@pytest.mark.parametrize(
    ("wanted", "width", "found"), [(32, 64, 32), (32, 48, 16), (128, 64, 64), (0, 48, 48), (16, 40, None)]
)
def test_groups_are_what_divides_the_inputs(wanted: int, width: int, found: int | None) -> None:
    bundle = tiny.bundle(FAMILY)
    path = bundle.tower("vision").blocks[1].mlp.reader
    bundle.replace(path, nn.Linear(width, 48))
    _, plan = run(bundle, group_size=wanted)
    assert plan.decisions["groups"].get(path) == found
    layer = bundle.module(path)
    if found is None:
        assert plan.decisions["layers"][path] == "W8A16"
        assert path in plan.decisions["towers"]["vision"]["eight_bit"]
        assert type(layer) is QuantizedLinear
    else:
        assert isinstance(layer, PackedLinear)
        assert layer.group_size == found


def test_a_table_and_the_linear_that_shares_its_weight_keep_8_bits() -> None:
    bundle, plan = run(decoding.bundle(), group_size=16)
    assert isinstance(bundle.module(decoding.LAST), TiedLinear)
    assert isinstance(bundle.module(decoding.TABLE), QuantizedEmbedding)
    assert {decoding.LAST, decoding.TABLE} <= set(plan.decisions["towers"]["decoder"]["eight_bit"])


def test_bytes_shrink_as_promised() -> None:
    bundle, plan = run(group_size=16, towers=("vision",))
    for layer in packed(bundle).values():
        weights = layer.in_features * layer.out_features
        # A scale of 4 bytes and half a byte of zero point, rounded up in each row, for 16 weights.
        assert layer.weight_int4.nbytes == weights // 2
        assert layer.weight_scale.nbytes == 4 * weights // 16
        assert layer.weight_zero_point.nbytes == layer.out_features * -(-layer.in_features // 32)
    after = Quantize().fit(bundle, Context())["bytes"]["vision"]
    assert after < 0.3 * plan.decisions["towers"]["vision"]["bytes_before"]


@pytest.mark.parametrize("rounding", ["nearest", "hqq"])
def test_weights_alone_need_no_data(rounding: Any) -> None:
    bundle, plan = run(rounding=rounding)
    assert packed(bundle)
    assert plan.tensors == {}


def test_what_takes_how_many_bits_is_said() -> None:
    assert told({"a": 32, "b": 16, "c": 32}, []) == "3 layers take 4 bits (2 in groups of 32, 1 in groups of 16)"
    assert told({"a": 32}, ["table", "head"]) == "1 layers take 4 bits (1 in groups of 32); 8 bits: table, head"
    assert told({}, ["b", "c", "d", "e", "f"]) == "0 layers take 4 bits (none can); 8 bits: b, c, d and 2 more"


def test_gptq_needs_data_and_says_so() -> None:
    with pytest.raises(UsageError, match="rounding the weights by gptq of the vision tower needs data"):
        run(rounding="gptq")


def spread(bundle: Bundle) -> Bundle:
    """The bundle with channels of very different size behind its norms, as trained models have them."""
    with torch.no_grad():
        for block in bundle.tower("vision").blocks:
            for norm in ("norm1", "norm2"):
                bundle.module(f"{block.path}.{norm}").weight[::7] *= 8  # type: ignore[index]
    return bundle


def test_each_way_of_rounding_is_nearer_to_what_the_layers_gave_out() -> None:
    original = spread(tiny.bundle(FAMILY))
    paths = original.tower("vision").blocks[1].mlp.writers
    sums = Sums(full=True)
    handle = original.module(paths[0]).register_forward_pre_hook(
        lambda module, args: sums.add(args[0].detach().flatten(0, -2))
    )
    original.embed("vision", tiny.images(8))
    handle.remove()
    errors = {}
    for rounding in ("nearest", "hqq", "gptq", "adaround"):
        bundle, _ = run(copy.deepcopy(original), context(), rounding=rounding, towers=("vision",))
        one, other = (made.module(paths[0]).weight for made in (original, bundle))
        errors[rounding] = output_error(one, other, sums.second_moment()).sum().item()  # type: ignore[arg-type]
    assert errors["hqq"] < errors["nearest"]
    assert errors["gptq"] < 0.7 * errors["hqq"]
    assert errors["adaround"] < 0.7 * errors["hqq"]


def test_gptq_gives_the_same_however_little_room_its_moments_have(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny.bundle(FAMILY)
    tower = bundle.tower("vision")
    linears = {path: m for path, m in bundle.model.named_modules() if isinstance(m, nn.Linear) and tower.owns(path)}
    assert len(quantize_moments.runs(bundle, tower, linears)) == 1
    settings: dict[str, Any] = {"rounding": "gptq", "towers": ("vision",), "sensitivity_samples": 0}
    _, once = run(data=context(), **settings)
    # Room for the moments of four inputs of 48 channels: a block has three, and one of its hidden neurons.
    monkeypatch.setattr(quantize_moments, "MOMENTS_BYTES", 4 * 4 * 48 * 48)
    assert len(quantize_moments.runs(bundle, tower, linears)) > 3
    _, often = run(data=context(), **settings)
    assert once.tensors.keys() == often.tensors.keys()
    assert all(torch.equal(once.tensors[name], value) for name, value in often.tensors.items())


def test_layers_of_one_input_are_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sums] = []
    monkeypatch.setattr(quantize_moments, "Sums", lambda full: made.append(Sums(full)) or made[-1])
    bundle, plan = run(data=context(), rounding="gptq", towers=("vision",), sensitivity_samples=0)
    blocks = len(bundle.tower("vision").blocks)
    # Queries, keys and values; their output; and the two Linears of an MLP. Outside of the blocks each for itself.
    outside = len(plan.decisions["groups"]) - 6 * blocks
    assert len(made) == 4 * blocks + outside


def test_what_costs_most_goes_back_to_8_bits_and_only_then_to_float() -> None:
    original = spread(tiny.bundle(FAMILY))
    settings: dict[str, Any] = {"towers": ("vision",), "group_size": 0, "rounding": "nearest"}
    _, everything = run(copy.deepcopy(original), context(), **settings)
    free = everything.decisions["towers"]["vision"]
    assert free["given_8_bits"] == free["kept_float"] == []
    limit = (1 + free["cosine"]) / 2
    bundle, plan = run(copy.deepcopy(original), context(), min_cosine=limit, **settings)
    report = plan.decisions["towers"]["vision"]
    assert report["cosine"] >= limit > report["cosine_all_quantized"] == free["cosine"]
    assert report["given_8_bits"]
    assert report["kept_float"] == []
    for path in report["given_8_bits"]:
        assert plan.decisions["layers"][path] == "W8A16"
        assert path not in plan.decisions["groups"]
        assert isinstance(bundle.module(path), QuantizedLinear)
    assert packed(bundle).keys() == plan.decisions["groups"].keys() != everything.decisions["groups"].keys()
    _, eight = run(copy.deepcopy(original), context(), scheme="W8A16", towers=("vision",))
    limit = (1 + eight.decisions["towers"]["vision"]["cosine"]) / 2
    bundle, plan = run(copy.deepcopy(original), context(), min_cosine=limit, **settings)
    report = plan.decisions["towers"]["vision"]
    assert report["cosine"] >= limit
    assert report["kept_float"]
    assert not set(report["kept_float"]) & set(plan.decisions["layers"])
    assert not packed(bundle)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"group_size": 48}, "quantize.group_size is 48; expected 0 or one of 16, 32, 64, 128"),
        ({"target": "tensorrt"}, "W4A16 does not go to tensorrt"),
        ({"scheme": "W8A16", "text_scheme": "W4A16", "target": "tensorrt"}, "W4A16 does not go to tensorrt"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(**{"scheme": "W4A16", **params})
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_only_onnxruntime_on_the_cpu_may_round_inputs(target: Any) -> None:
    bundle, _ = run(target=target)
    assert {layer.rounds_inputs for layer in packed(bundle).values()} == {target == "cpu"}
