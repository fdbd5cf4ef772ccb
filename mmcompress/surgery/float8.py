"""An nn.Linear of 8-bit floats (E4M3), weights and inputs, that leaves as QuantizeLinear/DequantizeLinear when exported.

    weight_float8       (out, in) float8_e4m3fn:  weight = weight_float8 * weight_scale
    weight_scale        (out,)
    input_scale         () of the layer's input, where calibration has found one; otherwise each token has its own (`tokens`)
    bias                as before, trainable

In torch the arithmetic is done in float on rounded values, with gradients straight through the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcompress.ops.float8 import FLOAT8, fake_float8, to_float8
from mmcompress.ops.rounding import choose_scale, dequantize
from mmcompress.ops.token_rounding import TOKEN_FLOAT8, TokenGrid, round_tokens
from mmcompress.surgery.quantized_base import Quantized, chunks
from mmcompress.surgery.token_operators import token_product


class Float8Linear(Quantized):
    """nn.Linear in E4M3; inputs (..., in) -> (..., out)."""

    weight_float8: Tensor
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, static: bool) -> None:
        """Round the weight; on meta tensors everything stays meta. `static`: inputs have one grid, to be set."""
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes = torch.empty(weight.shape, dtype=FLOAT8.dtype, device=weight.device)
        scales = []
        for rows in chunks(weight):
            scale, _ = choose_scale(weight[rows], FLOAT8, axis=0)
            codes[rows] = to_float8(weight[rows], scale[:, None])
            scales.append(scale)
        self.register_buffer("weight_float8", codes)
        self.register_buffer("weight_scale", torch.cat(scales).to(weight.dtype))
        one = torch.ones((), dtype=weight.dtype, device=weight.device)
        self.register_buffer("input_scale", one if static else None)
        self.register_buffer("input_gain", None)
        self.tokens: TokenGrid | None = None if static else TOKEN_FLOAT8
        self.bias = linear.bias

    def set_input_grid(self, scale: Tensor) -> None:
        """Set what calibration found for the layer's input."""
        assert self.input_scale is not None, "each token has its own grid"
        self.input_scale.copy_(scale)

    @property
    def weight_shape(self) -> torch.Size:
        return self.weight_float8.shape

    def stored_rows(self, start: int, stop: int) -> Tensor:
        return dequantize(self.weight_float8[start:stop], self.weight_scale[start:stop], axis=0)

    def rounded(self, values: Tensor, rows: slice | Tensor) -> Tensor:
        return fake_float8(values, self.weight_scale[rows][:, None])

    def store_rows(self, values: Tensor, rows: slice) -> None:
        self.weight_float8[rows] = to_float8(values, self.weight_scale[rows][:, None])

    def input_grid(self) -> tuple[float, int] | None:
        if self.tokens is not None:
            return 1.0, self.tokens.zero_point
        return None if self.input_scale is None else (float(self.input_scale), 0)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            y = self._product(x)
            return y if self.bias is None else y + self.bias
        if self.tokens is not None:
            x = round_tokens(x, self.tokens)
        elif self.input_scale is not None:
            x = fake_float8(x, self.input_scale)
        return self._linear(x, self.bias)

    def _product(self, x: Tensor) -> Tensor:
        """Return x weight' as a graph computes it."""
        matrix = torch.ops.mmcompress.float8_matrix(self.weight_float8, self.weight_scale)
        if self.tokens is not None:
            return token_product(x, matrix, self.tokens)
        product: Tensor = torch.ops.mmcompress.float8_input(x, self.input_scale) @ matrix
        return product

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, FP8, inputs {'by token' if self.input_scale is None else 'of one scale'}"
