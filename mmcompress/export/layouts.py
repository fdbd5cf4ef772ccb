"""How other tools store quantized layers: what a layout can say of a layer, the tensors, and the entry in config.json.

A layout is chosen for a whole model (`LAYOUTS`): GPTQ and AWQ know one size of groups for all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from mmcompress.bundle import Bundle
from mmcompress.ops import layouts
from mmcompress.ops.grouped import GROUP_SIZES, Grouped, unpack
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear, TiedLinear
from mmcompress.surgery.quantized_base import Quantized

WHOLE_ROW = -1


class Layout(Protocol):
    """One way of storing quantized layers."""

    @property
    def name(self) -> str: ...

    @property
    def loaded_by(self) -> str:
        """What loads it, for a person."""

    @property
    def scales(self) -> torch.dtype | None:
        """What scales are rounded to; None: nothing."""

    def refusal(self, path: str, layer: Quantized) -> str:
        """Return why a layer has to be floats, or "" where it can be said."""

    def kind(self, layer: Quantized) -> str:
        """Return what becomes of a layer that can be said, for a person."""

    def tensors(self, layer: Quantized) -> dict[str, Tensor]:
        """Return what takes the place of such a layer's `weight`."""

    def config(self, said: Mapping[str, Quantized], floats: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config` of a model with the layers `said` and the Linears `floats`."""


@dataclass(frozen=True)
class CompressedTensors:
    """8 and 4 bits, and 8-bit inputs; nothing is rounded."""

    rounds_inputs: bool
    """Whether some layers have 8-bit inputs, which transformers keeps only where it does not make weights floats as it loads."""
    loaded_by: str
    name: str = "compressed-tensors"
    scales: torch.dtype | None = None

    @classmethod
    def of(cls, bundle: Bundle, layers: Mapping[str, Quantized]) -> CompressedTensors:
        linears = [layer for layer in layers.values() if not _no_linear(layer)]
        rounds_inputs = any(_input_grid(layer) is not None for layer in linears)
        why_not = ""
        if rounds_inputs and any(isinstance(layer, PackedLinear) for layer in linears):
            # Where it is not to make floats, compressed-tensors 0.20 expects packed zero points unpacked, and refuses the file.
            why_not = "4-bit layers beside those with 8-bit inputs"
        if any(
            isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1
            for entry in get_model_conversion_mapping(bundle.model)
        ):
            # transformers 5.23 knows how to cut older checkpoints of DINOv2, and adds the layout's tensors to what it cuts.
            why_not = "models whose older checkpoints it would have to cut"
        package = " and transformers with the package compressed-tensors"
        return cls(rounds_inputs, f"vLLM{f' (not transformers, which refuses {why_not})' if why_not else package}")

    def refusal(self, path: str, layer: Quantized) -> str:
        return _no_linear(layer)

    def kind(self, layer: Quantized) -> str:
        return "int-quantized" if _input_grid(layer) is not None else "pack-quantized"

    def tensors(self, layer: Quantized) -> dict[str, Tensor]:
        if isinstance(layer, PackedLinear):
            return layouts.compressed_tensors_int4(grouped(layer))
        assert isinstance(layer, QuantizedLinear), f"{type(layer).__name__} was refused"
        zero_point = _input_grid(layer)
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
            groups[f"group_{number}"] = kind.group(["Linear"] if len(own) == len(said) else own)
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

    @classmethod
    def of(cls, layer: Quantized) -> _CompressedKind:
        if isinstance(layer, PackedLinear):
            return cls(4, 0 if layer.group_size == layer.in_features else layer.group_size, None)
        zero_point = _input_grid(layer)
        return cls(8, 0, None if zero_point is None else zero_point.dtype)

    def group(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.bits == 8,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size or None,
            "dynamic": False,
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
            "format": "pack-quantized" if inputs is None else "int-quantized",
        }


@dataclass(frozen=True)
class _FourBits:
    """What GPTQ and AWQ share: 4-bit weights in groups of one size for the whole model, eight outputs to a word, half scales."""

    group_size: int
    scales: torch.dtype | None = torch.float16

    def refusal(self, path: str, layer: Quantized) -> str:
        reason = _no_linear(layer)
        if reason or not isinstance(layer, PackedLinear):
            return reason or "8 bits"
        if not _fits(layer, self.group_size):
            return f"groups of {layer.group_size}, not of {self.group_size}"
        if layer.out_features % 32:
            # Eight share a word, and kernels take four words at a time.
            return f"{layer.out_features} outputs, no multiple of 32"
        scale = layer.weight_scale.float()
        # In float16's normal range a number is at most half of 2^-10 from the nearest.
        if ((scale.half().float() - scale).abs() > scale * 2**-11).any():
            return f"scales from {scale.min():.1e} to {scale.max():.1e}, beyond float16"
        return ""

    def kind(self, layer: Quantized) -> str:
        return "4 bits, one group a row" if self.group_size == WHOLE_ROW else f"4 bits in groups of {self.group_size}"

    def _grouped(self, layer: Quantized) -> Grouped:
        assert isinstance(layer, PackedLinear), f"{type(layer).__name__} was refused"
        return layouts.in_groups_of(grouped(layer), layer.in_features if self.group_size < 0 else self.group_size)


@dataclass(frozen=True)
class Awq(_FourBits):
    """AutoAWQ's "gemm" layout."""

    name: str = "awq"
    loaded_by: str = "vLLM and transformers with the package gptqmodel"

    @classmethod
    def of(cls, bundle: Bundle, layers: Mapping[str, Quantized]) -> Awq:
        return cls(cheapest_size(layers.values()))

    def tensors(self, layer: Quantized) -> dict[str, Tensor]:
        return layouts.awq(self._grouped(layer))

    def config(self, said: Mapping[str, Quantized], floats: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "modules_to_not_convert": list(floats),
        }


@dataclass(frozen=True)
class Gptq(_FourBits):
    """AutoGPTQ's layout, without reordered columns."""

    blocks: str = ""
    """The stack of blocks whose Linears it says; transformers looks in no other."""
    inside: tuple[str, ...] = ()
    """Those Linears, by their path in a block: the same in every block."""
    first_format: bool = True
    """Zero points less 1, which everything reads; impossible where one is 0."""
    name: str = "gptq"
    loaded_by: str = "vLLM and transformers with the packages gptqmodel and optimum"

    @classmethod
    def of(cls, bundle: Bundle, layers: Mapping[str, Quantized]) -> Gptq:
        sized = cls(cheapest_size(layers.values()))
        fit = {path: layer for path, layer in layers.items() if not sized.refusal(path, layer, anywhere=True)}
        weights = {
            stack: sum(layer.weight_shape.numel() for path, layer in fit.items() if path.startswith(stack + "."))
            for stack in (tower.blocks_path for tower in bundle.towers())
        }
        stack = max(weights, key=weights.__getitem__)
        placed = [path.removeprefix(stack + ".").partition(".") for path in fit if path.startswith(stack + ".")]
        deepest = Counter(inside for _, _, inside in placed)
        count = len({index for index, _, _ in placed})
        inside = tuple(name for name, times in deepest.items() if times == count)
        own = [layer for path, layer in fit.items() if _within(path, stack, inside)]
        zero = any(bool((grouped(layer).zero_point == 0).any()) for layer in own if isinstance(layer, PackedLinear))
        return cls(sized.group_size, blocks=stack, inside=inside, first_format=not zero)

    def refusal(self, path: str, layer: Quantized, anywhere: bool = False) -> str:
        reason = super().refusal(path, layer)
        if reason or anywhere:
            return reason
        if not path.startswith(self.blocks + "."):
            return f"outside of {self.blocks}, where alone transformers looks"
        return "" if _within(path, self.blocks, self.inside) else "not of 4 bits in every block"

    def tensors(self, layer: Quantized) -> dict[str, Tensor]:
        return layouts.gptq(self._grouped(layer), self.first_format)

    def config(self, said: Mapping[str, Quantized], floats: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            "bits": 4,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": False,
            "lm_head": False,
            "checkpoint_format": "gptq" if self.first_format else "gptq_v2",
            # transformers and optimum read the first two, vLLM and GPTQModel the third.
            "block_name_to_quantize": self.blocks,
            "modules_in_block_to_quantize": [list(self.inside)],
            "dynamic": {"-:^" + path.replace(".", r"\.") + "$": {} for path in floats},
        }


LAYOUTS: dict[str, Callable[[Bundle, Mapping[str, Quantized]], Layout]] = {
    "compressed-tensors": CompressedTensors.of,
    "gptq": Gptq.of,
    "awq": Awq.of,
}
"""Name -> what makes a layout for a model and its quantized layers."""


def grouped(layer: PackedLinear) -> Grouped:
    """Return a 4-bit layer's weight, unpacked."""
    scale = layer.weight_scale
    return Grouped(unpack(layer.weight_int4, layer.in_features), scale, unpack(layer.weight_zero_point, scale.shape[1]))


def cheapest_size(layers: Iterable[Quantized]) -> int:
    """Return the size of groups that takes the fewest bytes: layers whose own it does not divide become halves."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]

    def taken(size: int) -> float:
        return sum(_bytes(layer, size) if _fits(layer, size) else 2 * layer.weight_shape.numel() for layer in packed)

    return min((WHOLE_ROW, *GROUP_SIZES), key=taken)


def _bytes(layer: PackedLinear, size: int) -> float:
    """Half a byte a weight; of each group a half scale and half a byte of zero point."""
    groups = 1 if size == WHOLE_ROW else layer.in_features // size
    return layer.weight_shape.numel() / 2 + layer.out_features * groups * 2.5


def _fits(layer: PackedLinear, size: int) -> bool:
    return layer.group_size == layer.in_features if size == WHOLE_ROW else layer.group_size % size == 0


def _within(path: str, stack: str, inside: Sequence[str]) -> bool:
    return path.startswith(stack + ".") and path.removeprefix(stack + ".").partition(".")[2] in inside


def _no_linear(layer: Quantized) -> str:
    if isinstance(layer, TiedLinear):
        return "its weight is an embedding table's"
    if not isinstance(layer, PackedLinear | QuantizedLinear):
        return f"{type(layer).__name__.removeprefix('Quantized')}, no Linear"
    return ""


def _input_grid(layer: Quantized) -> Tensor | None:
    """The zero point of a layer's rounded input, None where it is not rounded."""
    return getattr(layer, "input_zero_point", None)
