"""quantize with gains folded into norms and rows: which are, that nothing else changes, and that graphs multiply less."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.export.trace import quiet
from mmcompress.export.translations import translations
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_channels import Channels
from mmcompress.surgery.folding import fold
from tests import tiny

FAMILY = "dual_encoder_dinov2"
PRE_NORM = ("siglip", "dual_encoder_vit", FAMILY, "llava_siglip", "qwen2_5_vl", "whisper", "smolvlm")
POST_NORM_TEXT = ("dual_encoder_vit", FAMILY)
"""Their text tower is a BERT."""


def run(bundle: Bundle, family: str, **params: Any) -> Plan:
    made = Quantize(**{"scheme": "W8A8", "min_cosine": -1.0, "sensitivity_samples": 0, **params})
    made.check(bundle)
    plan = made.plan(bundle, Context(data=tiny.data(family, 8), num_samples=8, batch_size=4))
    made.apply(bundle, plan)
    return plan


def readers(bundle: Bundle, tower: str) -> list[list[str]]:
    """Per block, the Linears that read the norm before attention, and those that read the one before the MLP."""
    found = []
    for block in bundle.tower(tower).blocks:
        crossing = [[block.cross.writers[0]]] if block.cross else []
        found += [sorted(block.attention.writers), *crossing, sorted(block.mlp.writers)]
    return found


@pytest.mark.parametrize("family", PRE_NORM)
def test_every_norm_of_a_pre_norm_block_takes_the_gain_of_those_that_read_it(family: str) -> None:
    bundle = tiny.bundle(family)
    plan = run(bundle, family)
    folded = list(plan.decisions["folds"].values())
    for tower in bundle.towers():
        if tower.name != "text" or family not in POST_NORM_TEXT:
            assert all(group in folded for group in readers(bundle, tower.name)), tower.name
    for path in plan.decisions["layers"]:
        layer: Any = bundle.module(path)
        assert not any(path in group for group in folded) or layer.input_gain is None


def test_norms_whose_output_is_added_to_something_keep_out_of_it() -> None:
    """BERT's blocks are post-norm: what a norm gives out is also what the next attention adds to."""
    bundle = tiny.bundle(FAMILY)
    plan = run(bundle, FAMILY, towers=("text",))
    values = [block.attention.writers[-1] for block in bundle.tower("text").blocks]
    assert list(plan.decisions["folds"]) == values
    for block in bundle.tower("text").blocks:
        assert all(bundle.module(path).input_gain is not None for path in block.attention.writers)


def test_norms_that_multiply_by_one_more_than_their_weight_keep_out_of_it() -> None:
    bundle = tiny.bundle("paligemma")
    plan = run(bundle, "paligemma")
    norms = [path for path in plan.decisions["folds"] if "norm" in path]
    assert norms
    assert all(norm.startswith("model.vision_tower") for norm in norms)
    for block in bundle.tower("language").blocks:
        assert all(bundle.module(path).input_gain is not None for path in block.mlp.writers)


@pytest.mark.parametrize("family", PRE_NORM)
def test_values_and_the_linear_half_of_gated_mlps_take_the_gain_of_what_reads_them(family: str) -> None:
    bundle = tiny.bundle(family)
    plan = run(bundle, family)
    for tower in bundle.towers():
        for block in tower.blocks:
            for attention in filter(None, (block.attention, block.cross)):
                assert plan.decisions["folds"][attention.writers[-1]] == [attention.reader]
            mlp = block.mlp
            assert (plan.decisions["folds"].get(mlp.writers[-1]) == [mlp.reader]) == (len(mlp.writers) == 2)
            assert (bundle.module(mlp.reader).input_gain is None) == (len(mlp.writers) == 2)


def test_heads_that_look_at_the_same_values_share_what_folds_into_them() -> None:
    """Golden: 4 heads of 2 channels, made of 2 heads of rows that come after 3 others."""
    channels = Channels("values", heads=4, kv_heads=2, width=2, first=3)
    sizes = torch.tensor([1.0, 2, 3, 1, 5, 6, 9, 2])
    gain = channels.once(sizes, partial(torch.amax, dim=1))
    assert gain.tolist() == [3, 2, 3, 2, 9, 6, 9, 6]
    assert channels.factors(gain, rows=8).tolist() == [1, 1, 1, 3, 2, 9, 6, 1]


def test_what_a_quantized_weight_takes_over_goes_into_its_scales() -> None:
    made = {}
    for way in (True, False):
        made[way] = tiny.bundle("llava_clip")
        params = {"scheme": "W4A16", "scaling": "awq", "group_size": 16, "towers": ("language",)}
        run(made[way], "llava_clip", fold=way, **params)
    mlp = made[True].tower("language").blocks[0].mlp
    folded, plain = (bundle.module(mlp.writers[1]) for bundle in made.values())
    assert torch.equal(folded.weight_int4, plain.weight_int4)  # type: ignore[arg-type]
    reader = made[False].module(mlp.reader)
    assert folded.input_gain is None
    wanted: Any = plain.weight_scale * reader.input_gain[:, None]  # type: ignore[index, operator]
    torch.testing.assert_close(folded.weight_scale, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["siglip", "llava_siglip", "whisper", "qwen2_vl"])
def test_folding_alone_changes_nothing(family: str) -> None:
    """In float64 and without rounding: norms multiplied, weights divided."""
    original = tiny.bundle(family)
    plan = run(copy.deepcopy(original), family)
    folded = copy.deepcopy(original)
    for bundle in (original, folded):
        bundle.model.double()
    with torch.no_grad():
        for maker, paths in plan.decisions["folds"].items():
            gain = plan.tensors[f"{paths[0]}.gain"].double()
            assert (gain - 1).abs().max() > 0.1
            fold(folded.module(maker), plan.tensors[f"{maker}.fold"].double())
            for path in paths:
                folded.module(path).weight /= gain  # type: ignore[operator]
    for tower in original.towers():
        inputs = {
            name: value.double() if value.is_floating_point() else value
            for name, value in original.example_inputs(tower.name, 2).items()
        }
        want, made = (bundle.encode(tower.name, inputs) for bundle in (original, folded))
        torch.testing.assert_close(made, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("params", [{"scheme": "W8A8"}, {"scheme": "W4A16", "scaling": "awq", "group_size": 16}])
def test_a_folded_model_computes_what_one_with_gains_does(params: dict[str, Any]) -> None:
    original = tiny.bundle("siglip")
    made = {}
    for way in (True, False):
        made[way] = copy.deepcopy(original)
        run(made[way], "siglip", fold=way, observer="min-max", **params)
    for tower in ("vision", "text"):
        inputs = original.example_inputs(tower, 2)
        # A value between two steps of its grid may go to the other one.
        one, other = (nn.functional.normalize(bundle.encode(tower, inputs), dim=-1) for bundle in made.values())
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_a_norm_one_of_whose_readers_stays_float_keeps_out_of_it() -> None:
    bundle = tiny.bundle(FAMILY)
    block = bundle.tower("vision").blocks[1]
    before = copy.deepcopy(bundle.model.state_dict())
    plan = run(bundle, FAMILY, towers=("vision",), keep_float=(block.attention.writers[1],))
    assert f"{block.path}.norm1" not in plan.decisions["folds"]
    assert f"{block.path}.norm2" in plan.decisions["folds"]
    after = bundle.model.state_dict()
    assert torch.equal(after[f"{block.path}.norm1.weight"], before[f"{block.path}.norm1.weight"])
    gain = plan.tensors[f"{block.mlp.writers[0]}.gain"]
    for name in (f"{block.path}.norm2.weight", f"{block.path}.norm2.bias"):
        assert torch.equal(after[name], before[name] * gain)


def test_planning_changes_nothing_and_nothing_is_folded_where_it_is_not_asked_for() -> None:
    bundle = tiny.bundle(FAMILY)
    before = copy.deepcopy(bundle.model.state_dict())
    data = Context(data=tiny.dataset(8), num_samples=8, batch_size=4)
    assert Quantize(min_cosine=-1.0).plan(bundle, data).decisions["folds"]
    assert "folds" not in Quantize(min_cosine=-1.0, fold=False).plan(bundle, data).decisions
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())


def test_graphs_multiply_once_less_where_a_gain_is_folded() -> None:
    """A norm by root mean square and an MLP; LayerNorms take a gain while they are exported, too."""
    counts = {}
    for way in (True, False):
        bundle = tiny.bundle("llava_clip")
        run(bundle, "llava_clip", scheme="W4A16", scaling="awq", group_size=16, towers=("language",), fold=way)
        block = bundle.tower("language").blocks[1].path
        part = nn.Sequential(bundle.module(f"{block}.post_attention_layernorm"), bundle.module(f"{block}.mlp")).eval()
        with quiet():
            program = torch.export.export(part, (torch.zeros(1, 5, 32),))
            made = torch.onnx.export(program, dynamo=True, custom_translation_table=translations(), verbose=False)
        assert made is not None
        counts[way] = sum(node.op_type == "Mul" for node in made.model.graph)
    assert counts[False] - counts[True] == 2  # after the norm, and before the second product
