"""quantize with weights rounded to samples: scaled channels (AWQ) and clipped ranges; ops/test_awq has the maths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.gptq import output_error
from mmcompress.ops.grouped import nearest, on_grid
from mmcompress.ops.half_quadratic import half_quadratic_grid
from mmcompress.passes.base import Context, Work
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_fit import Rounding, looks
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from mmcompress.surgery.watch import Sums, padding_mask
from tests import tiny
from tests.passes import decoding
from tests.passes.fitting import FAMILY, VLM, context, run, spread


def moments(bundle: Bundle, tower: str, paths: list[str], data: Context) -> dict[str, Tensor]:
    """E[x x'] of the Linears' inputs over tokens that are not padding, gathered here."""
    sums = {path: Sums(full=True) for path in paths}
    masks: list[Tensor | None] = []

    def hook(path: str) -> Any:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, mask = args[0].detach(), masks[-1]
            fits = mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape
            sums[path].add(x[mask.bool()] if fits and mask is not None else x.flatten(0, -2))

        return before

    handles = [bundle.module(path).register_forward_pre_hook(hook(path)) for path in paths]
    assert data.data is not None
    samples = [data.data[index] for index in range(len(data.data))]
    for start in range(0, len(samples), data.batch_size):
        items = [
            item for sample in samples[start : start + data.batch_size] for item in bundle.items(tower, sample)[:1]
        ]
        inputs = bundle.prepare(tower, items)
        masks.append(padding_mask(inputs))
        with torch.no_grad():
            bundle.encode(tower, inputs)
    for handle in handles:
        handle.remove()
    return {path: found.second_moment() for path, found in sums.items()}


def errors(original: Bundle, made: Bundle, paths: list[str], seen: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for path in paths:
        layer: Any = made.module(path)
        rounded = layer.weight if layer.input_gain is None else layer.weight * layer.input_gain
        found[path] = output_error(original.module(path).weight.detach(), rounded, seen[path]).sum().item()  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("rounding", ["nearest", "hqq", "gptq"])
def test_scales_and_clipping_never_raise_what_rounding_does_to_outputs(rounding: Any) -> None:
    original, settings = spread(), {"rounding": rounding, "towers": ("vision",), "fold": False}
    block = original.tower("vision").blocks[1]
    groups = [list(block.attention.writers), [block.attention.reader], list(block.mlp.writers), [block.mlp.reader]]
    paths = [path for group in groups for path in group]
    seen = moments(original, "vision", paths, context())
    ways: dict[str, dict[str, Any]] = {"plain": {}, "clip": {"clip": True}, "awq": {"scaling": "awq"}}
    ways["both"] = {"scaling": "awq", "clip": True}
    found = {}
    for name, params in ways.items():
        made, _ = run(copy.deepcopy(original), context(), **settings, **params)
        each = errors(original, made, paths, seen)
        found[name] = [sum(each[path] for path in group) for group in groups]
    for one, other in (("clip", "plain"), ("awq", "plain")):
        assert all(a <= b * (1 + 1e-4) for a, b in zip(found[one], found[other], strict=True))
        assert sum(found[one]) < 0.97 * sum(found[other])
    assert sum(found["both"]) < sum(found["clip"])


def test_layers_of_one_input_share_their_scales() -> None:
    bundle, plan = run(spread(), context(), scaling="awq", fold=False)
    scaled = plan.decisions["scaled"]
    assert set(scaled.values()) <= {step / 20 for step in range(1, 20)}
    for tower in bundle.towers():
        for block in tower.blocks:
            q, k, v = (bundle.module(path) for path in block.attention.writers)
            assert len({scaled.get(path) for path in block.attention.writers}) == 1
            if block.attention.writers[0] in scaled:
                assert torch.equal(q.input_gain, k.input_gain)  # type: ignore[arg-type]
                assert torch.equal(q.input_gain, v.input_gain)  # type: ignore[arg-type]
    for path, module in bundle.model.named_modules():
        if isinstance(module, PackedLinear):
            assert (module.input_gain is not None) == (path in scaled)


def test_channels_that_are_alike_leave_weights_as_plain_rounding_does() -> None:
    """H = I: nothing to scale, and no error that another column could make up for."""
    torch.manual_seed(0)
    linear, unit = nn.Linear(64, 24), torch.eye(64)
    for rounding in ("nearest", "gptq", "adaround"):
        made = Rounding(Quantize(scheme="W4A16", rounding=rounding), unit).made(linear, 16)  # type: ignore[arg-type]
        weight = linear.weight.detach()
        plain = nearest(weight, 16) if rounding == "nearest" else on_grid(weight, *half_quadratic_grid(weight, 16))
        assert torch.equal(made.weight, plain.dequantized())


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_what_rounding_makes_up_for_is_seen_in_scaled_inputs(rounding: Any) -> None:
    """Scaling by hand, and rounding to the moment of inputs that were scaled."""
    torch.manual_seed(0)
    linear, x, gain = nn.Linear(64, 24), torch.randn(200, 64) @ torch.randn(64, 64), torch.logspace(-1, 1, 64)
    settings = Quantize(scheme="W4A16", rounding=rounding)
    one = Rounding(settings, x.T @ x / 200, gain).made(linear, 16)
    scaled = copy.deepcopy(linear)
    with torch.no_grad():
        scaled.weight /= gain
    x = x * gain
    other = Rounding(settings, x.T @ x / 200).made(scaled, 16)
    assert (one.weight != other.weight).float().mean() < 0.01  # the same sums in another order


def test_8_bit_weights_can_be_scaled_too() -> None:
    original = spread()
    paths = list(original.tower("vision").blocks[1].mlp.writers)
    seen = moments(original, "vision", paths, context())
    settings: dict[str, Any] = {"scheme": "W8A16", "towers": ("vision",), "fold": False}
    plain, _ = run(copy.deepcopy(original), context(), **settings)
    made, plan = run(copy.deepcopy(original), context(), scaling="awq", **settings)
    assert isinstance(made.module(paths[0]), QuantizedLinear)
    assert paths[0] in plan.decisions["scaled"]
    assert errors(original, made, paths, seen)[paths[0]] < 0.9 * errors(original, plain, paths, seen)[paths[0]]


def test_a_weight_that_is_shared_with_a_table_is_not_scaled() -> None:
    _, plan = run(decoding.bundle(), decoding.context(), scheme="W8A16", scaling="awq")
    assert plan.decisions["scaled"]
    assert decoding.LAST not in plan.decisions["scaled"]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("family", [FAMILY, VLM, "paligemma"])
def test_a_checkpoint_is_what_was_saved(family: str, fold: bool, tmp_path: Any) -> None:
    bundle, plan = run(spread(family), context(family), scaling="awq", clip=True, correct_bias=True, fold=fold)
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert bool(plan.decisions.get("folds")) == fold
    one, other = (each.model.state_dict() for each in (bundle, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for tower in bundle.towers():
        inputs = bundle.example_inputs(tower.name)
        assert torch.equal(bundle.encode(tower.name, inputs), again.encode(tower.name, inputs))


@pytest.mark.parametrize("params", [{}, {"scaling": "awq"}, {"scheme": "W8A16"}])
def test_corrected_biases_leave_outputs_where_they_were_on_average(params: dict[str, Any]) -> None:
    original = spread()
    paths = [path for block in original.tower("vision").blocks for path in (block.mlp.reader, block.attention.reader)]
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        original.module(path).register_forward_pre_hook(lambda module, args, path=path: seen[path].append(args[0]))
        for path in paths
    ]
    Quantize(scheme="W4A16", clip=True, sensitivity_samples=0, towers=("vision",)).plan(original, context())
    for handle in handles:
        handle.remove()
    plain, _ = run(copy.deepcopy(original), context(), fold=False, **params)
    made, _ = run(copy.deepcopy(original), context(), fold=False, correct_bias=True, **params)
    for path in paths:
        inputs = torch.cat(seen[path])
        with torch.no_grad():
            wanted, one, other = (each.module(path)(inputs) for each in (original, plain, made))
        off, left = (float((found - wanted).mean((0, 1)).abs().max()) for found in (one, other))
        assert left < off / 20


def test_what_goes_back_to_8_bits_or_float_loses_its_scales_and_its_bias() -> None:
    original = spread()
    settings: dict[str, Any] = {"towers": ("vision",), "group_size": 0, "rounding": "nearest", "scaling": "awq"}
    settings |= {"sensitivity_samples": 8, "correct_bias": True}
    _, everything = run(copy.deepcopy(original), context(), **settings)
    limit = 1 - (1 - everything.decisions["towers"]["vision"]["cosine"]) / 4
    bundle, plan = run(copy.deepcopy(original), context(), **{**settings, "min_cosine": limit})
    back = plan.decisions["towers"]["vision"]["given_8_bits"]
    assert set(back) & set(everything.decisions["scaled"])
    assert not set(back) & set(plan.decisions["scaled"])
    folded = {path for readers in plan.decisions["folds"].values() for path in readers}
    assert not folded & set(back)
    unscaled = [path for path in back if path not in plan.decisions["folds"]]
    assert any(original.module(path).bias is not None for path in unscaled)
    for path in unscaled:
        layer: Any = bundle.module(path)
        assert layer.input_gain is None
        bias = original.module(path).bias
        assert bias is None or torch.equal(layer.bias, bias)  # type: ignore[arg-type]
        torch.testing.assert_close(layer.weight, original.module(path).weight, rtol=0, atol=0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scheme": "W8A8", "scaling": "awq"}, "quantize.scaling is 'awq', which is for weights alone"),
        ({"scheme": "W8A16", "clip": True}, "quantize.clip is for 4-bit weights"),
        ({"scheme": "W8A8", "correct_bias": True}, "quantize.correct_bias is for weights alone"),
        (
            {"scheme": "auto", "bits": 6, "correct_bias": True},
            "quantize.correct_bias is for layers whose scheme is known",
        ),
        ({"scheme": "W4A16", "balance": "modality"}, "quantize.balance is 'modality', but nothing is asked for"),
    ],
)
def test_parameters_that_do_nothing_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(**params)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("params", "ways"),
    [({"scaling": "awq"}, "awq"), ({"clip": True}, "clip"), ({"rounding": "adaround"}, "adaround")],
)
def test_samples_are_needed_and_asked_for(params: dict[str, Any], ways: str) -> None:
    with pytest.raises(UsageError, match=f"rounding the weights by {ways} of the vision tower needs data"):
        run(tiny.bundle(FAMILY), Context(), **params)


def test_what_adaround_takes_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden: 200 products of each Linear of the towers with the moment of its inputs; twice where two grids are tried."""
    bundle, work = tiny.bundle("clip"), Work(samples=10, dataset=10, forward=0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shapes = [module.weight.shape for module in bundle.model.modules() if type(module) is nn.Linear]
    once = 200 * sum(rows * columns**2 for rows, columns in shapes) / 3e10 / 2
    for params, factor in (
        ({}, 1),
        ({"clip": True}, 2),
        ({"clip": True, "scaling": "awq"}, 4),
        ({"rounding": "gptq"}, 0),
    ):
        settings: dict[str, Any] = {"scheme": "W4A16", "group_size": 16, "rounding": "adaround", **params}
        assert Quantize(**settings).seconds(bundle, work) == pytest.approx(factor * once)
    widest = max(columns for _, columns in shapes)
    held = {way: Quantize(scheme="W4A16", group_size=16, rounding=way).holds(bundle) for way in ("adaround", "nearest")}
    assert held == {"adaround": 16 * widest**2 + 12 * 4 * 2**18, "nearest": 0}


def test_runs_are_counted_beforehand() -> None:
    bundle = tiny.bundle(VLM)
    tower = bundle.tower("language")
    assert looks(Quantize(scheme="W4A16"), bundle, tower) == 0
    assert looks(Quantize(scheme="W8A8"), bundle, tower) == 0
    assert looks(Quantize(scheme="W4A16", clip=True), bundle, tower) == 1
    assert looks(Quantize(scheme="W8A16", scaling="awq", balance="modality"), bundle, tower) == 4
    assert looks(Quantize(scheme="W8A16", scaling="awq", balance="modality"), bundle, bundle.tower("vision")) == 1
    work = Work(samples=10, dataset=10, forward=1.0)
    assert Quantize(scheme="W4A16", clip=True, sensitivity_samples=0).seconds(bundle, work) == 10
    assert not Quantize(scheme="W4A16", scaling="awq").streams()
    assert Quantize(scheme="W4A16").streams()
