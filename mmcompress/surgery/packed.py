"""An nn.Linear whose weights are stored in 4 bits, two to a byte, and leave that way when exported.

    weight_int4         (out, in / 2) uint8, two codes to a byte, the earlier in the lower half
    weight_scale        (out, G) one per group of `group_size` neighbouring inputs, and
    weight_zero_point   (out, ceil(G / 2)) uint8, packed likewise:  weight = (code - zero point) * scale
    input_gain          (in,) what the input is multiplied by, the weight having been divided by it (AWQ). Optional.
    bias                as before, trainable

Inputs stay floats, or each token's are rounded to 8 bits, block by block (`tokens`), as onnxruntime does. In torch the weight is
made of its codes whenever the layer is called, a large one some rows at a time.
Exported, the layer is one MatMulNBits, which onnxruntime and OpenVINO both multiply without unpacking it in memory.

`rounds_inputs` lets onnxruntime round each token's inputs to 8 bits, block by block, while it multiplies: with it a
single token is faster than in fp32 (python -m bench.four_bits), without it slower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmcompress.ops.grouped import Grouped, block_size_for, on_grid, pack, unpack
from mmcompress.ops.rounding import UINT4, fake_quantize
from mmcompress.ops.token_rounding import round_blocks
from mmcompress.surgery.quantized_base import Quantized, chunks
from mmcompress.surgery.rounding_operators import product_int4

Rounding = Callable[[Tensor, int], Grouped]
"""Rounds (R, C) in groups of so many columns."""


class PackedLinear(Quantized):
    """nn.Linear with 4-bit weights; inputs (..., in) -> (..., out)."""

    symmetric = False
    """Whether all zero points are the middle of the codes."""
    weight_int4: Tensor
    weight_zero_point: Tensor
    input_gain: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        group_size: int,
        rounding: Rounding | None = None,
        rounds_inputs: bool = False,
        gain: Tensor | None = None,
    ) -> None:
        """Round the weight. Without `rounding`, and on meta tensors, the buffers have their shapes and no values yet."""
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group_size, self.rounds_inputs = group_size, rounds_inputs
        self.block = block_size_for(self.in_features, group_size)
        assert linear.in_features % group_size == 0, f"{linear.in_features} inputs, groups of {group_size}"
        rows, groups = self.out_features, self.in_features // group_size
        codes = torch.empty(rows, self.in_features // 2, dtype=torch.uint8, device=weight.device)
        self.register_buffer("weight_int4", codes)
        self.register_buffer("weight_scale", torch.empty(rows, groups, dtype=weight.dtype, device=weight.device))
        zeros = torch.empty(rows, (groups + 1) // 2, dtype=torch.uint8, device=weight.device)
        self.register_buffer("weight_zero_point", zeros)
        # A copy: layers that share an input share its gain, and a checkpoint stores each tensor once.
        self.register_buffer("input_gain", None if gain is None else gain.to(weight, copy=True))
        self.bias = linear.bias
        if rounding is not None and not weight.is_meta:
            for part in chunks(weight):
                scaled = weight[part] if gain is None else weight[part] / gain.to(weight)
                self.set_rows(part, rounding(scaled, group_size))

    def set_rows(self, rows: slice, rounded: Grouped) -> None:
        """Store some rows of the weight."""
        self.weight_int4[rows] = pack(rounded.codes)
        self.weight_scale[rows] = rounded.scale.to(self.weight_scale.dtype)
        self.weight_zero_point[rows] = pack(rounded.zero_point)

    def packed_buffers(self) -> list[tuple[str, Tensor]]:
        """Return what the weight is stored in, by name."""
        return [(name, buffer) for name, buffer in self.named_buffers() if name != "input_gain"]

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def stored_rows(self, start: int, stop: int) -> Tensor:
        return self.grouped(start, stop).dequantized()

    def rounded(self, values: Tensor, rows: slice | Tensor) -> Tensor:
        scale, zero_point = self._grid(rows)
        steps = values.reshape(*scale.shape, -1)
        return fake_quantize(steps, scale[..., None], zero_point[..., None], UINT4).reshape(values.shape)

    def store_rows(self, values: Tensor, rows: slice) -> None:
        self.weight_int4[rows] = pack(on_grid(values, *self._grid(rows)).codes)

    def _grid(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero point) of some rows, both (rows, G)."""
        scale = self.weight_scale[rows]
        return scale, unpack(self.weight_zero_point[rows], scale.shape[1])

    def grouped(self, start: int = 0, stop: int | None = None) -> Grouped:
        """Return some rows of the weight as codes, scales and zero points."""
        return Grouped(unpack(self.weight_int4[start:stop], self.in_features), *self._grid(slice(start, stop)))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_gain is None else x * self.input_gain
        if not torch.compiler.is_exporting():
            return self._linear(self.rounded_input(x), self.bias)
        y = product_int4(x, self.weight_int4, self.weight_scale, self.weight_zero_point, self.block, self.rounds_inputs)
        return y if self.bias is None else y + self.bias

    def rounded_input(self, x: Tensor) -> Tensor:
        return x if self.tokens is None else round_blocks(x, self.block, self.tokens)

    @property
    def repeated_bytes(self) -> int:
        """Of a single group, of a whole row, a graph holds scale and zero point for every block."""
        groups = self.weight_scale.shape[1]
        blocks = self.in_features // self.block
        points = (blocks + 1) // 2 - self.weight_zero_point.shape[1]
        return (blocks - groups) * self.weight_scale[:, :1].nbytes + points * self.out_features

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {'W4A16' if self.tokens is None else 'W4A8'} in groups of {self.group_size}"
