"""One layer as an ONNX file, written as it is inside a whole model: for timing what a product takes in a scheme."""

from __future__ import annotations

from pathlib import Path

import torch
from onnxscript import ir
from torch import Tensor, nn

from mmcompress.export.graph import simplify
from mmcompress.export.onnx import DEFAULT_OPSETS
from mmcompress.export.trace import quiet, to_onnx


class _Alone(nn.Module):
    """A layer with the table whose weight it may share, which is elsewhere in a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.table = getattr(layer, "table", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def export_layer(layer: nn.Module, rows: int, columns: int, path: Path) -> None:
    """Write a Linear, quantized or not, that takes "x" of (batch, rows, columns) in float32.

    The batch stays open as in a model: with every size known, onnxruntime (1.32) makes one Gemm of product and bias before it looks
    for rounded inputs, and multiplies floats.
    """
    alone = _Alone(layer).eval()
    with quiet(), torch.no_grad():
        open_batch = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(alone, (torch.zeros(3, rows, columns),), dynamic_shapes=open_batch, strict=False)
        model = to_onnx(program, ["x"], ["y"], DEFAULT_OPSETS["float32"])
    simplify(model)
    ir.save(model, path)
