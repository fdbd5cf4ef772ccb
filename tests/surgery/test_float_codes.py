"""Linears of 4-bit floats: the sixteen numbers by their definitions, blocks by hand, and that layers stay as they are."""

from __future__ import annotations

import copy
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress.measure.size import parameters
from mmcompress.surgery.float_codes import fits, float_coded, is_float_coded, loading_config

pytest.importorskip("bitsandbytes", reason="pip install 'mmcompress[bnb]'")

KINDS = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def nf4_numbers() -> list[float]:
    """QLoRA, appendix E: quantiles of a normal distribution, eight above 0, seven below and 0, divided by the largest."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(end - (end - 0.5) * step / 8) for step in range(8)]
    below = [-NormalDist().inv_cdf(end - (end - 0.5) * step / 7) for step in range(7)]
    return sorted(number / above[0] for number in (*above, 0.0, *below))


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 32, bias=bias)


def coded(kind: Any = "nf4") -> Any:
    return float_coded(linear(), kind)


def dequantized(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_nf4_stands_for_quantiles_of_a_normal_distribution() -> None:
    found = coded("nf4").state_dict()["weight.quant_map"].tolist()
    assert found == pytest.approx(nf4_numbers(), abs=1e-5)
    assert (found[0], found[7], found[15]) == (-1, 0, 1)


def test_fp4_stands_for_a_sign_two_exponent_bits_and_one_of_fraction() -> None:
    # Exponents 2^1 to 2^3 with fraction 1 or 1.5, and 0 and 1/16 below them: 0, 1/16, 8, 12, 4, 6, 2, 3, over the largest.
    sizes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    numbers = [size / 12 for size in sizes] + [-size / 12 for size in sizes]
    assert coded("fp4").state_dict()["weight.quant_map"].tolist() == pytest.approx(numbers, abs=1e-6)


def test_each_block_of_64_has_its_largest_as_scale_and_codes_two_to_a_byte() -> None:
    """Row r holds r + 1 times the sixteen numbers, four times over: its codes count from 0 to 15."""
    layer = nn.Linear(64, 32, bias=False)
    numbers = torch.tensor(nf4_numbers())
    layer.weight = nn.Parameter(torch.arange(1, 33)[:, None] * numbers.repeat(4))
    stored = float_coded(layer, "nf4").state_dict()
    assert stored["weight.absmax"].tolist() == list(range(1, 33))
    assert bytes(stored["weight"].flatten().tolist()).hex() == "0123456789abcdef" * 4 * 32


@KINDS
def test_it_multiplies_by_what_the_codes_stand_for(kind: Any) -> None:
    layer, made = linear().eval(), coded(kind).eval()
    x = torch.randn(3, 5, 128)
    with torch.inference_mode():
        assert torch.equal(made(x), nn.functional.linear(x, dequantized(made), layer.bias))
    assert made(x.requires_grad_()).sum().backward() is None
    assert made.bias.grad is not None


@KINDS
def test_calls_and_copies_leave_what_is_stored_alone(kind: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes' own layers repack themselves when they are called."""
    made = coded(kind).eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    copied = copy.deepcopy(made)
    for layer in (made, copied):
        with torch.inference_mode():
            layer(torch.randn(2, 128))
        after = layer.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_on_meta_it_has_the_weights_place_and_no_values() -> None:
    made = float_coded(linear().to("meta"), "nf4")
    assert is_float_coded(made)
    assert {name: value.is_meta for name, value in made.state_dict().items()} == {"weight": True, "bias": True}


def test_its_size_is_counted_as_stored() -> None:
    counted = parameters(coded())
    assert counted.elements == 128 * 32 + 32
    # Half a byte a weight, 4 bytes for each block of 64, the sixteen numbers, the bias; and JSON that bitsandbytes writes.
    description = coded().state_dict()["weight.quant_state.bitsandbytes__nf4"].numel()
    assert counted.bytes == 128 * 32 // 2 + 4 * (128 * 32 // 64) + 4 * 16 + 4 * 32 + description


@pytest.mark.parametrize(("inputs", "outputs", "expected"), [(64, 32, True), (96, 32, False), (64, 48, False)])
def test_sizes_are_those_every_kernel_takes(inputs: int, outputs: int, expected: bool) -> None:
    assert fits(nn.Linear(inputs, outputs)) is expected


def test_what_stays_a_linear_is_named_for_transformers() -> None:
    model = nn.Sequential(linear(), coded("fp4"), nn.ReLU())
    made = loading_config(model, "bfloat16")
    assert made is not None
    assert made["llm_int8_skip_modules"] == ["0"]
    assert (made["bnb_4bit_quant_type"], made["bnb_4bit_compute_dtype"]) == ("fp4", "bfloat16")
    assert loading_config(nn.Sequential(linear()), "float32") is None
