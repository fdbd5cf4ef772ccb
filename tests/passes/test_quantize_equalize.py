"""quantize with equalized ranges: nothing changes before rounding, no data is looked at; ops/test_equalization has the maths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.gptq import output_error
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_channels import Channels, channels_of, maker_of
from mmcompress.passes.quantize_moments import linears_of
from mmcompress.surgery.folding import fold
from mmcompress.views import Tower
from tests import tiny
from tests.passes.fitting import FAMILY, context, run
from tests.passes.test_quantize_fit import moments

# Fused and separate projections, cross-attention, heads that share keys and values, gated MLPs.
FAMILIES = ("blip", FAMILY, "whisper", "llava_siglip", "qwen2_5_vl")
ZERO = 3


def pairs_of(bundle: Bundle, tower: Tower) -> dict[str, Channels]:
    """Reader -> rows, of the Linears there are: factors only where a layer has two."""
    there = linears_of(bundle, [path for path, _ in bundle.model.named_modules()])
    return {reader: channels for reader, channels in channels_of(tower).items() if reader in there}


def unlike(family: str) -> Bundle:
    """A model whose channels differ between attentions' values and outputs and inside MLPs; one of each is made of zeros."""
    bundle = tiny.bundle(family)
    with torch.no_grad():
        for tower in bundle.towers():
            for reader, channels in pairs_of(bundle, tower).items():
                weight: Any = bundle.module(channels.maker).weight
                weight[channels.first : channels.first + channels.width : 3] *= 7
                weight[channels.first + ZERO] = 0
                bundle.module(reader).weight[:, ::2] *= 5  # type: ignore[index]
    return bundle


def before_rounding(original: Bundle, plan: Plan) -> Bundle:
    """What the plan makes of the model, in float64 and all weights as they are before they are rounded."""
    folded = copy.deepcopy(original)
    folded.model.double()
    with torch.no_grad():
        for maker, paths in plan.decisions["folds"].items():
            fold(folded.module(maker), plan.tensors[f"{maker}.fold"].double())
            for path in paths:
                folded.module(path).weight /= plan.tensors[f"{path}.gain"].double()  # type: ignore[operator]
    return folded


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_before_rounding_and_ranges_are_equal(family: str) -> None:
    original = unlike(family)
    _, plan = run(copy.deepcopy(original), Context(), scaling="equalize")
    folded = before_rounding(original, plan)
    exact = copy.deepcopy(original)
    exact.model.double()
    for tower in original.towers():
        inputs = {
            name: value.double() if value.is_floating_point() else value
            for name, value in original.example_inputs(tower.name, 2).items()
        }
        want, made = (bundle.encode(tower.name, inputs) for bundle in (exact, folded))
        torch.testing.assert_close(made, want, rtol=1e-6, atol=1e-6)
        pairs = pairs_of(original, tower)
        folds = {channels.maker: [reader] for reader, channels in pairs.items()}
        assert folds.items() <= plan.decisions["folds"].items()
        for reader, channels in pairs.items():
            weight: Any = folded.module(channels.maker).weight
            count = channels.kv_heads * channels.width
            rows = weight[channels.first : channels.first + count].abs().amax(1).view(channels.kv_heads, 1, -1)
            columns: Any = folded.module(reader).weight.abs().amax(0)  # type: ignore[operator, union-attr]
            # Heads that share a row share its gain: the largest of their columns is as large as the row.
            read = columns.view(channels.kv_heads, -1, channels.width).amax(1, keepdim=True)
            assert not rows.flatten()[ZERO]
            torch.testing.assert_close(rows[rows > 0], read[rows > 0], rtol=1e-5, atol=0)
            gain = plan.tensors[f"{reader}.gain"].view(channels.kv_heads, -1, channels.width)
            assert (gain.transpose(1, 2).flatten(0, 1)[ZERO] == 1).all()
            assert gain.log().std() > 0.1


def test_rows_by_hand() -> None:
    """Golden: 4 heads of 2 channels, made of 2 heads of rows that come after 3 others."""
    channels = Channels("values", heads=4, kv_heads=2, width=2, first=3)
    assert channels.of_rows(torch.arange(8.0)).tolist() == [3, 4, 3, 4, 5, 6, 5, 6]
    assert Channels("up", 1, 1, 3).of_rows(torch.tensor([7.0, 8, 9])).tolist() == [7, 8, 9]


def test_the_second_factor_makes_channels_and_the_first_reads_them() -> None:
    original = tiny.bundle("llava_siglip")
    thinner = passes.build("factorize", {"ratio": 0.2, "method": "svd", "towers": ("language",)})
    thinner.apply(original, thinner.plan(original, Context()))
    _, plan = run(copy.deepcopy(original), Context(), scaling="equalize", towers=("language",))
    pairs = pairs_of(original, original.tower("language"))
    folds = {maker_of(original, channels): [reader] for reader, channels in pairs.items()}
    assert plan.decisions["folds"] == folds
    assert any(maker.endswith(".up") for maker in folds)
    assert any(reader.endswith(".down") for (reader,) in folds.values())
    inputs = original.example_inputs("language", 2)
    want, made = (bundle.encode("language", inputs) for bundle in (original, before_rounding(original, plan)))
    torch.testing.assert_close(made.float(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("params", [{}, {"scheme": "W8A16"}, {"rounding": "hqq"}, {"scheme": "W4A8"}])
def test_what_is_saved_is_loaded_without_data_and_without_gains(params: dict[str, Any], tmp_path: Any) -> None:
    bundle, plan = run(unlike("llava_siglip"), Context(), scaling="equalize", **params)
    assert set(plan.decisions["scaled"].values()) == {0.5}
    assert {name.rpartition(".")[2] for name in plan.tensors} == {"gain", "fold"}
    assert all(bundle.module(path).input_gain is None for path in plan.decisions["scaled"])
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model").model.state_dict()
    assert bundle.model.state_dict().keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in bundle.model.state_dict().items())


@pytest.mark.parametrize(
    "params", [{"rounding": "gptq"}, {"clip": True}, {"rounding": "adaround", "correct_bias": True}]
)
def test_samples_are_looked_at_as_gains_leave_them(params: dict[str, Any]) -> None:
    original, settings = unlike(FAMILY), {"scaling": "equalize", "towers": ("vision",)}
    readers = list(pairs_of(original, original.tower("vision")))
    seen = moments(original, "vision", readers, context())
    errors = []
    for given in ({}, params):
        made, plan = run(copy.deepcopy(original), context(), **settings, **given)
        total = 0.0
        for path in readers:
            rounded: Any = made.module(path).weight * plan.tensors[f"{path}.gain"]  # type: ignore[operator]
            wanted: Any = original.module(path).weight.detach()  # type: ignore[union-attr]
            total += float(output_error(wanted, rounded, seen[path]).sum())
        errors.append(total)
    assert errors[1] < 0.9 * errors[0]


def test_what_stays_more_precise_is_not_scaled() -> None:
    original, settings = unlike(FAMILY), {"scaling": "equalize", "towers": ("vision",), "group_size": 0}
    block = original.tower("vision").blocks[0]
    pattern = {"keep_float": (block.attention.reader,)}
    _, plan = run(copy.deepcopy(original), Context(), **settings, **pattern)
    assert block.attention.reader not in plan.decisions["scaled"]
    assert block.attention.writers[-1] not in plan.decisions["folds"]
    settings["sensitivity_samples"] = 8
    _, everything = run(copy.deepcopy(original), context(), **settings)
    limit = 1 - (1 - everything.decisions["towers"]["vision"]["cosine"]) / 4
    _, plan = run(copy.deepcopy(original), context(), **{**settings, "min_cosine": limit})
    back = set(plan.decisions["towers"]["vision"]["given_8_bits"])
    assert back & everything.decisions["scaled"].keys()
    assert not back & plan.decisions["scaled"].keys()
    assert not back & {path for paths in plan.decisions["folds"].values() for path in paths}


def test_a_maker_that_stays_float_takes_the_gain_over() -> None:
    original = unlike(FAMILY)
    values = original.tower("vision").blocks[0].attention.writers[-1]
    bundle, plan = run(copy.deepcopy(original), Context(), scaling="equalize", keep_float=(values,))
    factors = plan.tensors[f"{values}.fold"]
    for name, parameter in bundle.module(values).named_parameters():
        wanted = original.module(values).get_parameter(name) * factors.view(-1, *[1] * (parameter.dim() - 1))
        torch.testing.assert_close(parameter, wanted)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"fold": False},
            "quantize.scaling is 'equalize', which lets what makes inputs do the scaling, and fold is off",
        ),
        ({"scheme": "W8A8"}, "quantize.scaling is 'equalize', which is for weights alone"),
        ({"scheme": "auto", "bits": 6.0}, "quantize.scaling is 'equalize', and scheme auto"),
        ({"balance": "text"}, "quantize.balance is 'text', but nothing is asked for"),
        ({"keep_float": ("*",)}, "no Linear to be rounded reads what rows of another one make"),
        ({"scheme": "W4A16", "text_scheme": "W8A8", "towers": ("text",)}, "no Linear to be rounded reads"),
    ],
)
def test_what_nothing_can_be_equalized_in_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(**{"scheme": "W4A16", "scaling": "equalize", **params}).check(tiny.bundle(FAMILY))
    assert message in caught.value.message
    assert caught.value.hint
