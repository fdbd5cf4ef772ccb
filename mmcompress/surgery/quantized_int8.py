"""What layers of 8-bit integers share: the stored weight, and the grids that their inputs and outputs are rounded to."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.rounding import Levels, along, choose_scale, dequantize, fake_quantize, quantize
from mmcompress.ops.token_rounding import round_tokens
from mmcompress.surgery.quantized_base import Quantized, chunks
from mmcompress.surgery.rounding_operators import levels_of


class Int8(Quantized):
    """What Linear, Conv2d and Embedding share: the stored integers and, for W8A8, the grid of the input."""

    weight_int8: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_gain: Tensor | None

    def __init__(self, weight: Tensor, levels: Levels, inputs: Levels | None) -> None:
        """Round `weight`, one scale per index of its first dimension; on meta tensors everything stays meta."""
        super().__init__()
        self.levels = levels
        codes, scale = _rounded_rows(weight.detach(), levels)
        self.register_buffer("weight_int8", codes)
        self.register_buffer("weight_scale", scale.to(weight.dtype))
        self._add_input_grid(inputs)

    def _add_input_grid(self, inputs: Levels | None) -> None:
        input_scale = input_zero_point = None
        if inputs is not None:
            input_scale = torch.ones((), dtype=self.weight_scale.dtype, device=self.weight_scale.device)
            input_zero_point = torch.zeros((), dtype=inputs.dtype, device=self.weight_scale.device)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)
        self.register_buffer("input_gain", None)

    @property
    def weight_shape(self) -> torch.Size:
        return self.weight_int8.shape

    def stored_rows(self, start: int, stop: int) -> Tensor:
        return dequantize(self.weight_int8[start:stop], self.weight_scale[start:stop], axis=0)

    def rounded(self, values: Tensor, rows: slice | Tensor) -> Tensor:
        scale = along(self.weight_scale[rows], 0, values.ndim)
        return fake_quantize(values, scale, torch.zeros_like(scale), self.levels)

    def store_rows(self, values: Tensor, rows: slice) -> None:
        scale = self.weight_scale[rows]
        self.weight_int8[rows] = quantize(values, scale, torch.zeros_like(scale), self.levels, axis=0)

    def set_input_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set what calibration found for the layer's input."""
        assert self.input_scale is not None, "weight-only layer"
        assert self.input_zero_point is not None, "weight-only layer"
        self.input_scale.copy_(scale)
        self.input_zero_point.copy_(zero_point)

    def input_grid(self) -> tuple[float, int] | None:
        if self.tokens is not None:
            return 1.0, self.tokens.zero_point
        if self.input_scale is None or self.input_zero_point is None:
            return None
        return float(self.input_scale), int(self.input_zero_point)

    @property
    def reason_for_cpus(self) -> str:
        grid = self.input_zero_point
        if (grid is not None and (grid.dtype == torch.uint8 or bool(grid))) or (self.tokens and self.tokens.zero_point):
            return "rounds its input with a zero point; TensorRT takes symmetric int8 only"
        return ""

    def rounded_input(self, x: Tensor) -> Tensor:
        if self.tokens is not None:
            return round_tokens(x, self.tokens)
        if self.input_scale is None or self.input_zero_point is None:
            return x
        return on_grid(x, self.input_scale, self.input_zero_point)

    def _grid_name(self) -> str:
        if self.tokens is not None:
            return f"W8A8, {str(self.tokens.dtype)[6:]} inputs by token"
        return "W8A16" if self.input_zero_point is None else f"W8A8, {str(self.input_zero_point.dtype)[6:]} inputs"


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return floats at places of a tensor's one grid, while exporting as an operator of `surgery.rounding_operators`."""
    if torch.compiler.is_exporting():
        made: Tensor = torch.ops.mmcompress.round_values(x, scale, zero_point)
        return made
    return fake_quantize(x, scale, zero_point, levels_of(zero_point))


def _rounded_rows(weight: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the integers of `weight` and its scales (C,), some rows at a time."""
    codes = torch.empty(weight.shape, dtype=levels.dtype, device=weight.device)
    scales = []
    for rows in chunks(weight):
        scale, zero_point = choose_scale(weight[rows], levels, axis=0)
        codes[rows] = quantize(weight[rows], scale, zero_point, levels, axis=0)
        scales.append(scale)
    return codes, torch.cat(scales)
