"""A tower whose layers have several schemes leaves as one graph: 4-bit products, rounded inputs and floats side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mmcompress.export.onnx import export_onnx
from mmcompress.ops.half_quadratic import half_quadratic
from mmcompress.ops.rounding import UINT8
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear, quantized
from tests import tiny


def test_several_schemes_in_one_graph(tmp_path: Path) -> None:
    bundle = tiny.bundle("dual_encoder_dinov2")
    first, second, *_ = bundle.tower("vision").blocks
    linears: dict[str, nn.Linear] = {}
    for path in (*first.mlp.writers, first.mlp.reader, *second.mlp.writers, second.attention.reader):
        module = bundle.module(path)
        assert type(module) is nn.Linear
        linears[path] = module
    packed, (weights_only, static) = list(linears)[:2], list(linears)[2:4]
    for path in packed:
        bundle.replace(path, PackedLinear(linears[path], 16, half_quadratic, rounds_inputs=True))
    bundle.replace(weights_only, quantized(linears[weights_only], None))
    layer = quantized(linears[static], UINT8)
    assert isinstance(layer, QuantizedLinear)
    layer.set_input_grid(torch.tensor(0.03), torch.tensor(128, dtype=torch.uint8))
    bundle.replace(static, layer)
    # It raises where the graph differs from torch, or where a layer is not stored as it was promised.
    (report,) = export_onnx(bundle, tmp_path / "out", towers=["vision"], batches=(1,)).components
    nodes = report.component.nodes
    assert nodes["MatMulNBits"] == 2
    assert nodes["QuantizeLinear"] == 1
    assert nodes["DequantizeLinear"] == 3  # two weights and an input
    assert report.component.weights["INT8"] == sum(linears[path].weight.numel() for path in (weights_only, static))
    assert report.component.weights["UINT8"] >= sum(linears[path].weight.numel() // 2 for path in packed)
    assert min(row.cosine for row in report.parity) > 0.999
