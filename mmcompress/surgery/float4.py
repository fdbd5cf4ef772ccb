"""An nn.Linear whose weights are 4-bit floats (E2M1) in blocks, two to a byte: MXFP4 or NVFP4 (`ops.float4`). Inputs stay floats.

    weight_float4       (out, in / 2) uint8, two codes to a byte, the earlier in the lower half
    weight_block_scale  (out, G) of each block of 32 inputs, uint8 (E8M0), or of 16, float8_e4m3fn
    weight_scale        () of the whole weight; 1 with MXFP4:      weight = code * block scale * scale
    bias                as before, trainable

In torch the weight is made of its codes whenever the layer is called, a large one some rows at a time. Exported, it is a constant
of ONNX's own 4-bit type before a DequantizeLinear.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcompress.ops.float4 import BLOCKS, Format, block_scales, fake_float4, from_codes, on_grid, rounded, whole_scale
from mmcompress.ops.grouped import pack, unpack
from mmcompress.surgery.quantized_base import Quantized, chunks

MATRIX = "Float4Matrix"
"""Stands in a graph for the weight (in, out) until `export.four_bit_floats` says it in ONNX's own types."""


class Float4Linear(Quantized):
    """nn.Linear in E2M1; inputs (..., in) -> (..., out)."""

    weight_float4: Tensor
    weight_block_scale: Tensor

    def __init__(self, linear: nn.Linear, form: Format) -> None:
        """Round the weight; on meta tensors everything stays meta."""
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        size = BLOCKS[form]
        assert self.in_features % size == 0, f"{self.in_features} inputs, blocks of {size}"
        # Rounded to the dtype it is kept in first: the blocks then make up for what it is off.
        whole = whole_scale(weight.abs().max().float(), form).to(weight.dtype)
        codes = torch.empty(self.out_features, self.in_features // 2, dtype=torch.uint8, device=weight.device)
        kind = torch.uint8 if form == "mxfp4" else torch.float8_e4m3fn
        scales = torch.empty(self.out_features, self.in_features // size, dtype=kind, device=weight.device)
        for rows in chunks(weight):
            made = rounded(weight[rows], whole, form)
            codes[rows], scales[rows] = pack(made.codes), made.scale
        self.register_buffer("weight_float4", codes)
        self.register_buffer("weight_block_scale", scales)
        self.register_buffer("weight_scale", whole)
        self.register_buffer("input_gain", None)
        self.bias = linear.bias

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def stored_rows(self, start: int, stop: int) -> Tensor:
        codes = unpack(self.weight_float4[start:stop], self.in_features)
        return from_codes(codes, self.weight_scale.dtype) * self._steps(slice(start, stop)).repeat_interleave(
            BLOCKS[self.form], dim=1
        )

    def rounded(self, values: Tensor, rows: slice | Tensor) -> Tensor:
        steps = self._steps(rows)
        return fake_float4(values.reshape(*steps.shape, -1), steps[..., None]).reshape(values.shape)

    def store_rows(self, values: Tensor, rows: slice) -> None:
        steps = values.detach().float().unflatten(1, (-1, BLOCKS[self.form])) / self.weight_scale.float()
        self.weight_float4[rows] = pack(on_grid(steps, self.weight_block_scale[rows]).codes.flatten(1))

    def _steps(self, rows: slice | Tensor) -> Tensor:
        """Return what a code of 1 stands for in every block (rows, G), in the dtype of the scales."""
        return block_scales(self.weight_block_scale[rows], self.weight_scale.dtype) * self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return self._linear(x, self.bias)
        matrix: Tensor = torch.onnx.ops.symbolic(
            f"mmcompress::{MATRIX}",
            (self.weight_float4, self.weight_block_scale, self.weight_scale),
            dtype=x.dtype,
            shape=(self.in_features, self.out_features),
            version=1,
        )
        y = x @ matrix
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.form.upper()} in blocks of {BLOCKS[self.form]}"
