"""One quantized layer, as a plan says: for judging it before it is decided, for putting it in place, and for loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcompress.ops.grouped import nearest_symmetric
from mmcompress.ops.rounding import Levels
from mmcompress.ops.token_rounding import TOKEN_INT8, TokenGrid
from mmcompress.passes.base import Plan
from mmcompress.passes.quantize_logits import rounds_output
from mmcompress.passes.quantize_schemes import FLOAT_CODES, SCHEMES
from mmcompress.surgery.experts import QuantizedExperts, Stack, own_group, stacks_of
from mmcompress.surgery.float4 import Float4Linear
from mmcompress.surgery.float8 import Float8Linear
from mmcompress.surgery.float_codes import float_coded
from mmcompress.surgery.folding import fold
from mmcompress.surgery.packed import PackedLinear, Rounding
from mmcompress.surgery.quantized import QuantizedLinear, quantized
from mmcompress.surgery.quantized_base import Quantized


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
    """Whether runtimes may round the inputs of weights that alone are integers."""
    symmetric_experts: bool = False
    """Whether experts of 4 bits have zero points in the middle."""
    double_quant: bool = False
    """Whether the scales of 4-bit floats are rounded too."""
    tokens: TokenGrid | None = None
    """What each token's inputs are rounded to, where they have no one grid."""

    def made(self, module: nn.Module, path: str, plan: Plan, table: nn.Module | None = None) -> nn.Module:
        """Return what takes the place of `module`; `table` is the quantized embedding whose weight it shares."""
        made = self._made(module, path, plan, table)
        if isinstance(made, Quantized) and any(path in each for each in plan.decisions.get("folds", {}).values()):
            made.input_gain = None  # what makes its input has it
        if f"{path}.bias" in plan.tensors:
            made.bias = nn.Parameter(plan.tensors[f"{path}.bias"].clone())
        if f"{path}.fold" in plan.tensors:
            fold(made, plan.tensors[f"{path}.fold"])
        return made

    def _made(self, module: nn.Module, path: str, plan: Plan, table: nn.Module | None) -> nn.Module:
        scheme = plan.decisions["layers"][path]
        if stacks_of(module):
            return self._experts(module, path, plan)
        if scheme in FLOAT_CODES:
            assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}; only Linears have float codes"
            return float_coded(module, "nf4" if scheme == "NF4" else "fp4", self.double_quant)
        weights = SCHEMES[scheme].weights
        if weights == "float8":
            return self._float8(module, path, plan)
        if weights == "mxfp4" or weights == "nvfp4":
            assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}; only Linears have 4-bit floats"
            return Float4Linear(module, weights).train(module.training)
        gain = plan.tensors.get(f"{path}.gain")
        # A plan that was read back has no tensors: the structure is made, and a checkpoint fills it.
        shape_only = torch.ones(module.in_features, device="meta") if isinstance(module, nn.Linear) else None
        if not (scheme == "W8A8" and self.tokens is None):
            scaled = path in plan.decisions.get("scaled", {})
            gain = (shape_only if gain is None else gain) if scaled else None
            if SCHEMES[scheme].weights == "int4":
                return self._packed(module, path, plan, gain, rounds=SCHEMES[scheme].inputs == "dynamic")
            return self._by_token(module, scheme, gain, table)
        if gain is None and table is None and self.smooth:
            gain = shape_only
        made = quantized(module, self.inputs, self.weights, gain, table)
        if f"{path}.scale" in plan.tensors:
            made.set_input_grid(plan.tensors[f"{path}.scale"], plan.tensors[f"{path}.zero_point"])
        if rounds_output(path, plan.decisions):
            assert isinstance(made, QuantizedLinear), f"{path} makes queries or keys"
            made.add_output_grid(plan.tensors.get(f"{path}.output_scale"))
        return made

    def _by_token(self, module: nn.Module, scheme: str, gain: Tensor | None, table: nn.Module | None) -> nn.Module:
        """Return a layer whose inputs have no grid of their own: floats, or rounded token by token."""
        made = quantized(module, None, self.weights, gain, table)
        if isinstance(made, QuantizedLinear):
            made.rounds_inputs = scheme == "W8A16" and self.rounds_inputs
            made.tokens = None if scheme == "W8A16" else self.tokens
        return made

    def _float8(self, module: nn.Module, path: str, plan: Plan) -> nn.Module:
        assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}; only Linears have 8-bit floats"
        made = Float8Linear(module, static=self.tokens is None)
        if f"{path}.scale" in plan.tensors:
            made.set_input_grid(plan.tensors[f"{path}.scale"])
        return made.train(module.training)

    def _experts(self, module: nn.Module, path: str, plan: Plan) -> QuantizedExperts:
        """Return experts of integers: inputs stay floats, or are rounded in blocks where the weights have 4 bits."""
        scheme = SCHEMES[plan.decisions["layers"][path]]
        assert scheme.weights in ("int8", "int4"), f"{path} holds experts, which have no {scheme.weights} weights"
        rounds = scheme.inputs == "dynamic"

        def made(linear: nn.Linear) -> Stack:
            if scheme.weights == "int8":
                whole = quantized(linear, None, self.weights)
                assert isinstance(whole, QuantizedLinear), "made of a Linear"
                whole.rounds_inputs = self.rounds_inputs
                return whole
            size = own_group(linear.in_features, plan.decisions["groups"][path])
            rounding = nearest_symmetric if self.symmetric_experts else self.rounding
            packed = PackedLinear(linear, size, rounding, self.rounds_inputs or rounds)
            packed.symmetric = self.symmetric_experts
            packed.tokens = TOKEN_INT8 if rounds else None
            return packed

        return QuantizedExperts(module, made).train(module.training)

    def _packed(self, module: nn.Module, path: str, plan: Plan, gain: Tensor | None, rounds: bool) -> PackedLinear:
        assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}; only Linears have 4 bits"
        known = f"{path}.weight_int4" in plan.tensors
        size = plan.decisions["groups"][path]
        made = PackedLinear(module, size, None if known else self.rounding, self.rounds_inputs or rounds, gain)
        made.tokens = TOKEN_INT8 if rounds else None
        if known:
            for name, buffer in made.packed_buffers():
                buffer.copy_(plan.tensors[f"{path}.{name}"])
        return made.train(module.training)
