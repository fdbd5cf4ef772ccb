"""A mixture of experts by itself: a router and what it chooses from, small and random, in floats or integers."""

from __future__ import annotations

import copy
from typing import Any

import onnx
import torch
from onnxscript import ir
from torch import nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from mmcompress.export.graph import simplify
from mmcompress.export.onnx import DEFAULT_OPSETS
from mmcompress.export.trace import quiet, to_onnx
from mmcompress.passes.base import Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.surgery.routing import as_exported, chosen_alone


def mixture(width: int = 32, neurons: int = 48, experts: int = 4, top: int = 2) -> Any:
    """Channels, neurons of an expert, experts, and those a token goes through; outputs are of the size of inputs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "moe_intermediate_size": neurons, "num_experts": experts, "num_experts_per_tok": top}
    made = Qwen3VLMoeTextSparseMoeBlock(Qwen3VLMoeTextConfig(**sizes))
    made.experts.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made.eval()


def quantized(block: Any, scheme: str, size: int = 16, **settings: Any) -> Any:
    """Return a copy whose experts are integers, as `quantize` makes them; 4 bits in groups of `size`."""
    made = copy.deepcopy(block)
    plan = Plan({"layers": {"experts": scheme}, "groups": {"experts": size}})
    made.experts = Quantize(scheme=scheme, **settings).maker.made(made.experts, "experts", plan)
    return made


def dequantized(block: Any, of: Any) -> Any:
    """Return a copy of `block` in floats, whose experts are what those of `of` stand for."""
    made = copy.deepcopy(block)
    for name in ("gate_up_proj", "down_proj"):
        setattr(made.experts, name, nn.Parameter(of.experts.floats(name)))
    return made


def exported(block: Any, chosen: bool) -> onnx.ModelProto:
    """Return the graph of a mixture that takes "x" (batch, tokens, C)."""
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    inputs = (torch.zeros(3, 5, block.gate.hidden_dim),)
    with quiet(), torch.no_grad(), chosen_alone(chosen), as_exported(block.experts.config, {block.gate: block.experts}):
        program = torch.export.export(block, inputs, dynamic_shapes=dynamic, strict=False)
        model = to_onnx(program, ["x"], ["y"], DEFAULT_OPSETS["float32"])
    simplify(model)
    return ir.to_proto(model)
