"""Linears whose weights are 4-bit floats, NF4 or FP4: bitsandbytes' own layer, as transformers loads and saves it.

    weight                                (out * in / 2, 1) uint8, two codes to a byte, the earlier in the upper half
    weight.absmax                         one per block of 64 neighbouring weights: the largest, which code 1.0 stands for; doubly
                                          quantized, it is 8 bits (Dettmers et al., section 3) and two tables more say of what
    weight.quant_map                      (16,) what the codes stand for
    weight.quant_state.bitsandbytes__nf4  shape, block size and dtype, as JSON (__fp4 likewise)
    bias                                  as before, trainable

NF4's sixteen numbers are quantiles of a normal distribution, 0 among them (Dettmers et al. 2023, arXiv 2305.14314, appendix E);
FP4's are those a sign, two exponent bits and one of fraction can say.

A layer that was called on a CPU with AVX512-BF16 would repack itself, round absmax to bfloat16, and not be saved as it was
(bitsandbytes 0.50): ours never repack. Where plain transformers loads them they do, and such CPUs then want what
`fits` asks for.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcompress.errors import MissingError

Kind = Literal["nf4", "fp4"]

BLOCK = 64
"""Weights that share a scale."""
SCALES = 256
"""Doubly quantized: scales that share a scale."""
OUTPUTS = 32
"""Outputs that bitsandbytes' CPU kernel takes at a time."""


# It advises, at each start on such a CPU, to install what would fetch a kernel from the network: ours needs none.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)


def require_bitsandbytes() -> None:
    """Raise MissingError without bitsandbytes, or what transformers needs to load its layers."""
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"NF4 and FP4 need {package}", hint="pip install 'mmcompress[bnb]'")


def fits(linear: nn.Linear) -> bool:
    """Whether every kernel of bitsandbytes takes a Linear's size."""
    return linear.in_features % BLOCK == 0 and linear.out_features % OUTPUTS == 0


def float_coded(linear: nn.Linear, kind: Kind, double: bool = False) -> nn.Module:
    """Return the counterpart of a Linear with weights of 4-bit floats, sharing its bias; without values on the meta device.

    With `double` the scales of blocks are 8-bit numbers, with a scale of their own for each 256 of them.

    Raises MissingError without bitsandbytes.
    """
    require_bitsandbytes()
    import bitsandbytes

    settings: dict[str, Any] = {"quant_type": kind, "compress_statistics": double}
    with torch.device("meta"):
        made: Any = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, **settings)
    made.weight.data = made.weight.data.to(torch.uint8)
    made.support_avx512bf16_for_cpu = False
    made.requires_grad_(False)
    made.bias = linear.bias
    weight = linear.weight.detach()
    if not weight.is_meta:
        parameter: Any = bitsandbytes.nn.Params4bit(
            weight.contiguous(), requires_grad=False, blocksize=BLOCK, module=made, **settings
        )
        made.weight = parameter.to(weight.device)  # quantized by that
    # What transformers notes of a layer it has put in place; it asks it of those it finds when it loads (5.23).
    made.source_cls = nn.Linear
    made.float_kind, made.float_double = kind, double
    return made.train(linear.training)


def is_float_coded(module: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' Linear of 4 bits; without importing it."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes.")


def empty_codes(layer: Any) -> None:
    """Give a layer without values parts of the shapes they will have, that take no memory: to be counted.

    Doubly quantized, a layer is exact but for the digits of one number in its description.
    """
    import bitsandbytes

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)

    weights = layer.in_features * layer.out_features
    blocks = -(-weights // BLOCK)
    nested: dict[str, Any] = {}
    if layer.float_double:
        scales = bitsandbytes.functional.QuantState(
            absmax=zeros(-(-blocks // SCALES)), code=zeros(256), blocksize=SCALES, dtype=torch.float32
        )
        # Stored as text: a third has about as many digits as any.
        nested = {"offset": torch.tensor(1 / 3), "state2": scales}
    state = bitsandbytes.functional.QuantState(
        absmax=zeros(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=zeros(16),
        blocksize=BLOCK,
        quant_type=layer.float_kind,
        dtype=torch.float32,
        **nested,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        zeros(-(-weights // 2), 1, dtype=torch.uint8), requires_grad=False, quant_state=state, bnb_quantized=True
    )


@contextmanager
def codes_unread() -> Iterator[None]:
    """While active, such layers multiply by zeros of their weight's shape, which counters see: for counting what they multiply."""
    if "bitsandbytes" not in sys.modules:
        yield
        return
    layer: Any = sys.modules["bitsandbytes"].nn.Linear4bit
    before = layer.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = torch.zeros((), dtype=x.dtype, device=x.device).expand(self.out_features, self.in_features)
        return functional.linear(x, weight, self.bias)

    layer.forward = forward
    try:
        yield
    finally:
        layer.forward = before


def loading_config(model: nn.Module, dtype: str) -> dict[str, Any] | None:
    """Return transformers' `quantization_config` for a model with such layers, None for one without; `dtype` is computed in.

    All are of one kind: transformers cannot say two.
    """
    coded: list[Any] = [module for module in model.modules() if is_float_coded(module)]
    if not coded:
        return None
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": coded[0].float_kind,
        "bnb_4bit_use_double_quant": coded[0].float_double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [path for path, module in model.named_modules() if type(module) is nn.Linear],
    }
