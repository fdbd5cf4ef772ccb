"""The layouts of AutoGPTQ and AutoAWQ: 4-bit Linears, all of one size of groups, scales in float16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.layout import why_no_linear
from mmcompress.ops import layouts
from mmcompress.ops.grouped import GROUP_SIZES, Grouped
from mmcompress.plainly import plain_model
from mmcompress.surgery.float4 import Float4Linear
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized_base import Quantized

WHOLE_ROW = -1
"""The size of groups that are whole rows, as both write it."""


@dataclass(frozen=True)
class _FourBits:
    """What GPTQ and AWQ share: 4-bit weights in groups of one size for the whole model, eight outputs to a word, half scales."""

    group_size: int
    scales: torch.dtype | None = torch.float16

    def refusal(self, path: str, layer: Quantized) -> str:
        reason = why_no_linear(layer)
        if reason or not isinstance(layer, PackedLinear):
            return reason or ("4-bit floats" if isinstance(layer, Float4Linear) else "8 bits")
        if layer.of_experts:
            return "an expert's, which transformers has no Linear for; compressed-tensors holds them"
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
        return layouts.in_groups_of(layer.grouped(), layer.in_features if self.group_size < 0 else self.group_size)


@dataclass(frozen=True)
class Awq(_FourBits):
    """AutoAWQ's "gemm" layout."""

    left: tuple[str, ...] = ()
    """Layers that transformers leaves as they are whatever config.json says: the last one, and the output embeddings."""
    name: str = "awq"
    loaded_by: str = "transformers with the package gptqmodel; written for vLLM too, which was not tried"

    @classmethod
    def of(cls, bundle: Bundle, layers: Mapping[str, Quantized]) -> Awq:
        return cls(cheapest_size(layers.values()), left=tuple(sorted(get_keys_to_not_convert(plain_model(bundle)))))

    def refusal(self, path: str, layer: Quantized) -> str:
        reason = super().refusal(path, layer)
        left = not should_convert_module(path, list(self.left))
        return reason or ("transformers leaves it as it is" if left else "")

    def tensors(self, layer: Quantized) -> dict[str, Tensor]:
        return layouts.awq(self._grouped(layer))

    def config(self, said: Mapping[str, Quantized], floats: Sequence[str]) -> dict[str, Any]:
        for path in floats:
            mistaken = next((other for other in said if other.endswith(path) or f"{other}.".startswith(f"{path}.")), "")
            if mistaken:
                raise UsageError(
                    f"awq cannot leave {path} floats and say {mistaken}: its readers look at the beginnings and ends of names",
                    hint="use --to compressed-tensors, or keep both as floats with keep_float",
                )
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
    loaded_by: str = "transformers with the packages gptqmodel and optimum; written for vLLM too, which was not tried"

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
        zero = any(bool((layer.grouped().zero_point == 0).any()) for layer in own if isinstance(layer, PackedLinear))
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


def cheapest_size(layers: Iterable[Quantized]) -> int:
    """Return the size of groups that takes the fewest bytes: layers whose own it does not divide become halves."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear) and not layer.of_experts]

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
