"""One quantized layer, as a plan says: for judging it before it is decided, for putting it in place, and for loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mmcompress.ops.rounding import Levels
from mmcompress.passes.base import Plan
from mmcompress.passes.quantize_schemes import FLOAT_CODES
from mmcompress.surgery.float_codes import float_coded
from mmcompress.surgery.packed import PackedLinear, Rounding
from mmcompress.surgery.quantized import quantized


@dataclass(frozen=True)
class Maker:
    """Makes quantized layers; its fields are what is the same for all of them."""

    inputs: Levels
    """The grid of inputs with W8A8."""
    weights: Levels
    """The grid of 8-bit weights."""
    smooth: bool
    """Whether Linears with W8A8 have a gain."""
    rounding: Rounding
    """How 4-bit weights are rounded that the plan does not hold."""
    rounds_inputs: bool
    """Whether runtimes may round the inputs of 4-bit weights."""

    def made(self, module: nn.Module, path: str, plan: Plan, table: nn.Module | None = None) -> nn.Module:
        """Return what takes the place of `module`; `table` is the quantized embedding whose weight it shares."""
        scheme = plan.decisions["layers"][path]
        if scheme == "W4A16":
            return self._packed(module, path, plan)
        if scheme in FLOAT_CODES:
            assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}; only Linears have float codes"
            return float_coded(module, "nf4" if scheme == "NF4" else "fp4")
        if scheme == "W8A16":
            return quantized(module, None, self.weights, None, table)
        gain = plan.tensors.get(f"{path}.gain")
        # A plan that was read back has no tensors: the structure is made, and a checkpoint fills it.
        if gain is None and table is None and self.smooth and isinstance(module, nn.Linear):
            gain = torch.ones(module.in_features, device="meta")
        made = quantized(module, self.inputs, self.weights, gain, table)
        if f"{path}.scale" in plan.tensors:
            made.set_input_grid(plan.tensors[f"{path}.scale"], plan.tensors[f"{path}.zero_point"])
        return made

    def _packed(self, module: nn.Module, path: str, plan: Plan) -> nn.Module:
        assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}; only Linears have 4 bits"
        known = f"{path}.weight_int4" in plan.tensors
        size = plan.decisions["groups"][path]
        made = PackedLinear(module, size, None if known else self.rounding, self.rounds_inputs)
        if known:
            for name, buffer in made.named_buffers():
                buffer.copy_(plan.tensors[f"{path}.{name}"])
        return made.train(module.training)
