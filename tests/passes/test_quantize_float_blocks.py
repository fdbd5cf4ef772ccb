"""quantize with MXFP4 and NVFP4: which layers take them, what they are stored in, where they go, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.onnx_recount import onnx_macs
from mmcompress.measure.runners import open_runner
from mmcompress.ops.float4 import BLOCKS, block_scales, from_codes
from mmcompress.ops.grouped import unpack
from mmcompress.passes.base import Context
from mmcompress.passes.prune_units import count_costs
from mmcompress.passes.quantize import Quantize
from mmcompress.pipeline import Stage, run_stage
from mmcompress.recipe import Step
from mmcompress.surgery.float4 import Float4Linear
from mmcompress.surgery.quantized import QuantizedLinear
from mmcompress.surgery.quantized_base import Quantized
from tests import tiny

FORMS = ("MXFP4", "NVFP4")
STORED = {"MXFP4": torch.uint8, "NVFP4": torch.float8_e4m3fn}
forms = pytest.mark.parametrize("form", FORMS)


def context() -> Context:
    return Context(data=tiny.dataset(8), num_samples=8, batch_size=4)


def run(form: str, bundle: Bundle | None = None, **params: Any) -> Bundle:
    bundle = bundle or tiny.wide()
    given = {"scheme": form, "target": "openvino", "min_cosine": -1.0, **params}
    run_stage(bundle, Stage(1, Step("quantize", given), Quantize(**given)), context())
    return bundle


def blocked(bundle: Bundle) -> dict[str, Float4Linear]:
    return {path: module for path, module in bundle.model.named_modules() if isinstance(module, Float4Linear)}


def own_layers(bundle: Bundle, tower: str) -> list[Quantized]:
    owner = bundle.tower(tower)
    return [
        module for path, module in bundle.model.named_modules() if isinstance(module, Quantized) and owner.owns(path)
    ]


@torch.no_grad()
def embedded(bundle: Bundle) -> dict[str, Tensor]:
    return {t.name: bundle.encode(t.name, bundle.example_inputs(t.name, 2)) for t in bundle.towers()}


@forms
def test_what_a_layer_is_stored_in_and_stands_for(form: str) -> None:
    before = tiny.wide()
    bundle = run(form, copy.deepcopy(before))
    layers = blocked(bundle)
    assert len(layers) > 20
    for path, layer in layers.items():
        rows, columns = layer.out_features, layer.in_features
        size = BLOCKS[form.lower()]
        assert (layer.weight_float4.dtype, layer.weight_float4.shape) == (torch.uint8, (rows, columns // 2))
        assert (layer.weight_block_scale.dtype, layer.weight_block_scale.shape) == (
            STORED[form],
            (rows, columns // size),
        )
        assert sum(buffer.nbytes for buffer in layer.buffers()) == rows * columns // 2 + rows * columns // size + 4
        steps = block_scales(layer.weight_block_scale).repeat_interleave(size, 1) * layer.weight_scale
        torch.testing.assert_close(layer.weight, from_codes(unpack(layer.weight_float4, columns)) * steps)
        original = before.module(path).get_parameter("weight").detach()
        assert float((layer.weight - original).norm() / original.norm()) < 0.2
        assert layer.bias is not None
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    if form == "MXFP4":
        assert {float(layer.weight_scale) for layer in layers.values()} == {1.0}


@forms
def test_layers_that_no_block_divides_take_8_bits(form: str) -> None:
    bundle = tiny.wide()
    path = bundle.tower("vision").blocks[1].mlp.reader  # type: ignore[union-attr]
    bundle.replace(path, nn.Linear(128 + 8, 64))
    bundle.tower("vision")
    writer = bundle.tower("vision").blocks[1].mlp.writers[0]  # type: ignore[union-attr]
    bundle.replace(writer, nn.Linear(64, 128 + 8))
    made = Quantize(scheme=form, target="openvino", min_cosine=-1.0)
    plan = made.plan(bundle, Context())
    made.apply(bundle, plan)
    assert plan.decisions["layers"][path] == "W8A16"
    assert type(bundle.module(path)) is QuantizedLinear
    assert path in plan.decisions["towers"]["vision"]["eight_bit"]
    assert set(plan.decisions["groups"].values()) == {BLOCKS[form.lower()]}


def test_layers_are_given_back_to_8_bits_where_the_cosine_asks_for_it() -> None:
    loose, strict = run("MXFP4"), run("MXFP4", min_cosine=0.9999)
    assert 0 <= len(blocked(strict)) < len(blocked(loose))
    report = strict.history[-1].plan["towers"]["vision"]
    assert report["given_8_bits"]
    assert report["cosine"] > report["cosine_all_quantized"]


@forms
def test_reloads_bit_equal_and_keeps_its_types_in_half_precision(form: str, tmp_path: Path) -> None:
    bundle = run(form)
    checkpoint.save(bundle, tmp_path / "made")
    again = checkpoint.load(tmp_path / "made")
    assert blocked(again).keys() == blocked(bundle).keys()
    for tower, rows in embedded(bundle).items():
        assert torch.equal(embedded(again)[tower], rows)
    again.model.half()
    layer = next(iter(blocked(again).values()))
    assert (layer.weight_block_scale.dtype, layer.weight_scale.dtype, layer.weight.dtype) == (
        STORED[form], torch.float16, torch.float16,
    )  # fmt: skip


@pytest.mark.parametrize(("form", "opset", "kind"), [("MXFP4", 24, "FLOAT8E8M0"), ("NVFP4", 23, "FLOAT8E4M3FN")])
def test_exported_in_onnx_types_that_openvino_runs(form: str, opset: int, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'mmcompress[openvino]'")
    bundle = run(form)
    report = export_onnx(bundle, tmp_path / "made", towers=["vision"], batches=(1, 2))
    (part,) = report.components
    assert {row.runner for row in part.parity} == {"openvino"}
    assert report.artifact.opset == opset
    assert part.component.quantized == len(own_layers(bundle, "vision"))
    own = [layer for path, layer in blocked(bundle).items() if bundle.tower("vision").owns(path)]
    assert part.component.weights["FLOAT4E2M1"] == sum(layer.weight_float4.nbytes for layer in own)
    assert part.component.weights[kind] == sum(layer.weight_block_scale.nbytes for layer in own)
    path = tmp_path / "made" / "vision.onnx"
    graph = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", opset)]
    codes = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT4E2M1]
    assert len(codes) == len(own)
    pytest.importorskip("onnxruntime", reason="pip install 'mmcompress[cpu]'")
    size = bundle.example_inputs("vision", 1)["pixel_values"].shape
    assert onnx_macs(path, {"pixel_values": size}).total == count_costs(bundle, bundle.tower("vision")).macs
    with pytest.raises(UsageError, match="onnxruntime cannot load") as caught:
        open_runner("onnxruntime", path)
    assert "--runner openvino" in caught.value.hint


def test_integers_that_train_stay_on_their_blocks() -> None:
    layer = Float4Linear(nn.Linear(64, 8), "nvfp4")
    stored = layer.weight
    layer.store_rows(stored[:4], slice(0, 4))
    assert torch.equal(layer.weight, stored)
    values = (stored + 0.4 * layer._steps(slice(None)).repeat_interleave(16, 1)).requires_grad_()
    made = layer.rounded(values, slice(None))
    layer.store_rows(values, slice(None))
    torch.testing.assert_close(layer.weight, made.detach())
    made.sum().backward()
    assert values.grad is not None
    assert set(values.grad.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scheme": "NVFP4"}, "NVFP4 does not go to cpu"),
        ({"scheme": "MXFP4", "target": "tensorrt"}, "MXFP4 does not go to tensorrt"),
        ({"scheme": "NVFP4", "target": "openvino", "scaling": "awq"}, "no tower gets W4A16 or W8A16"),
        ({"scheme": "NVFP4", "target": "openvino", "clip": True}, "quantize.clip is for 4-bit weights"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Quantize(**params)
