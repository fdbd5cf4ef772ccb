"""The layout of the package compressed-tensors, which llm-compressor writes: integers, and 4-bit floats in blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from mmcompress.bundle import Bundle
from mmcompress.export.layout import input_grid, why_no_linear
from mmcompress.ops import layouts
from mmcompress.ops.float4 import BLOCKS
from mmcompress.surgery.experts import QuantizedExperts
from mmcompress.surgery.float4 import Float4Linear
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from mmcompress.surgery.quantized_base import Quantized

EXPERTS = r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"
ONE_BY_ONE = "experts.*."
"""What the names of experts begin with that transformers joins as it loads them."""


@dataclass(frozen=True)
class CompressedTensors:
    """8 and 4 bits, and 8-bit inputs; nothing is rounded.

    Of a mixture each expert is three Linears of its own. Neither transformers (5.24) nor vLLM takes zero points of experts: codes
    of 4 bits less theirs are written as 8 bits, which are the same numbers.
    """

    rounds_inputs: bool
    """Whether some layers have 8-bit inputs, which transformers keeps only where it does not make weights floats as it loads."""
    loaded_by: str
    name: str = "compressed-tensors"
    scales: torch.dtype | None = None

    @classmethod
    def of(cls, bundle: Bundle, layers: Mapping[str, Quantized]) -> CompressedTensors:
        linears = [layer for layer in layers.values() if not why_no_linear(layer)]
        rounds_inputs = any(input_grid(layer) is not None for layer in linears)
        why_not = ""
        if rounds_inputs and any(isinstance(layer, PackedLinear) for layer in linears):
            # Where it is not to make floats, compressed-tensors 0.20 expects packed zero points unpacked, and refuses the file.
            why_not = "4-bit layers beside those with 8-bit inputs"
        converters = [
            entry for entry in get_model_conversion_mapping(bundle.model) if isinstance(entry, WeightConverter)
        ]
        mixed = any(isinstance(module, QuantizedExperts) for module in bundle.model.modules())
        joined = any(ONE_BY_ONE in pattern for entry in converters for pattern in entry.source_patterns)
        if any(len(entry.target_patterns) > 1 for entry in converters):
            # transformers 5.23 knows how to cut older checkpoints of DINOv2, and adds the layout's tensors to what it cuts.
            why_not = "models whose older checkpoints it would have to cut"
        untried = "written for vLLM, which was not tried"
        if why_not:
            return cls(rounds_inputs, f"no one known ({untried}; not transformers, which refuses {why_not})")
        reader = "transformers with the package compressed-tensors"
        if mixed and not joined:
            # It loads all else and says of the experts no more than that they are new (5.24).
            reader += (
                ", which leaves the experts of this class at random numbers unless it is told first how to join them: "
                "transformers.conversion_mapping has register_checkpoint_conversion_mapping, and knows how for 'qwen2_moe'"
            )
        return cls(rounds_inputs, f"{reader}; {untried}")

    def refusal(self, path: str, layer: Quantized) -> str:
        return why_no_linear(layer)

    def kind(self, layer: Quantized) -> str:
        if isinstance(layer, PackedLinear) and layer.of_experts:
            return f"pack-quantized, experts of 4 bits {'without zero points' if layer.symmetric else 'stored in 8'}"
        return _CompressedKind.of(layer).format

    def tensors(self, layer: Quantized) -> dict[str, Tensor]:
        if isinstance(layer, PackedLinear):
            weight = layer.grouped()
            if not layer.of_experts:
                return layouts.compressed_tensors_int4(weight)
            if not layer.symmetric:
                steps = weight.codes.to(torch.int8) - weight.zero_point.to(torch.int8).repeat_interleave(
                    layer.group_size, 1
                )
                return layouts.compressed_tensors_int8(steps, weight.scale)
            made = layouts.compressed_tensors_int4(weight)
            del made["weight_zero_point"]
            return made
        if isinstance(layer, Float4Linear):
            return layouts.compressed_tensors_float4(layer.weight_float4, layer.weight_block_scale, layer.weight_scale)
        assert isinstance(layer, QuantizedLinear), f"{type(layer).__name__} was refused"
        zero_point = input_grid(layer)
        if zero_point is None:
            return layouts.compressed_tensors_int8(layer.weight_int8, layer.weight_scale)
        assert layer.input_scale is not None, "an input has a scale and a zero point"
        made = {
            "weight": layer.weight_int8,
            "weight_scale": layer.weight_scale[:, None],
            "input_scale": layer.input_scale[None],
        }
        if zero_point.dtype == torch.uint8:
            made["input_zero_point"] = (zero_point.to(torch.int16) - 128).to(torch.int8)[None]
        return made

    def config(self, said: Mapping[str, Quantized], floats: Sequence[str]) -> dict[str, Any]:
        kinds = {path: _CompressedKind.of(layer) for path, layer in said.items()}
        groups = {}
        for number, (kind, _) in enumerate(Counter(kinds.values()).most_common()):
            own = [path for path in said if kinds[path] == kind]
            targets = ["Linear"] if len(own) == len(said) else own
            if kind.experts and all(kinds[path] == kind for path, layer in said.items() if layer.of_experts):
                targets = [EXPERTS]  # by which transformers knows their group
            groups[f"group_{number}"] = kind.group(targets)
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(floats),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "dequantize": not self.rounds_inputs,
        }


@dataclass(frozen=True)
class _CompressedKind:
    """What one entry of `config_groups` says."""

    bits: int
    group_size: int
    """0: one scale per output."""
    inputs: torch.dtype | None
    symmetric: bool
    experts: bool = False
    """Whether it is told of experts apart from others."""
    floats: str = ""
    """The name of 4-bit floats."""

    @classmethod
    def of(cls, layer: Quantized) -> _CompressedKind:
        if isinstance(layer, Float4Linear):
            return cls(4, BLOCKS[layer.form], None, True, floats=layer.form)
        if isinstance(layer, PackedLinear):
            size = 0 if layer.group_size == layer.in_features else layer.group_size
            if layer.of_experts:
                return cls(4 if layer.symmetric else 8, size, None, True, experts=True)
            return cls(4, size, None, False)
        zero_point = input_grid(layer)
        return cls(8, 0, None if zero_point is None else zero_point.dtype, True)

    @property
    def format(self) -> str:
        if self.floats:
            return f"{self.floats}-pack-quantized"
        return "pack-quantized" if self.inputs is None else "int-quantized"

    def group(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size or None,
            "dynamic": False,
        }
        if self.floats:
            stored = "torch.uint8" if self.floats == "mxfp4" else "torch.float8_e4m3fn"
            strategy = "group" if self.floats == "mxfp4" else "tensor_group"
            weights |= {
                "type": "float",
                "symmetric": True,
                "strategy": strategy,
                "scale_dtype": stored,
                "zp_dtype": stored,
            }
        inputs = None
        if self.inputs is not None:
            inputs = {"num_bits": 8, "type": "int", "symmetric": self.inputs == torch.int8, "strategy": "tensor"}
            inputs["dynamic"] = False
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }
