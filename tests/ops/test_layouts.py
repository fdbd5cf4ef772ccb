"""Words of codes: golden values by hand, and what independent readers make of each layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmcompress.ops.grouped import Grouped, nearest
from mmcompress.ops.layouts import (
    awq,
    codes_of,
    compressed_tensors_int4,
    compressed_tensors_int8,
    gptq,
    in_groups_of,
    words,
)
from tests.unpacking import read_awq, read_gptq


def hexadecimal(found: Tensor) -> list[list[str]]:
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in found.tolist()]


def counting() -> Grouped:
    """Eight rows and columns of one group a row: codes row + column, zero points 1 to 8, scales 1 to 8."""
    steps = torch.arange(8, dtype=torch.uint8)
    return Grouped(steps[:, None] + steps, (steps[:, None] + 1).float(), steps[:, None] + 1)


def rounded(rows: int = 24, columns: int = 64, size: int = 16) -> Grouped:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return nearest(weight, size)


def test_the_first_code_lies_lowest_in_a_word() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15]], dtype=torch.uint8)
    assert hexadecimal(words(codes, 4)) == [["87654321", "0000000f"]]
    assert hexadecimal(words(codes, 8)) == [["04030201", "08070605", "0000000f"]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [8, 13, 64])
def test_words_give_their_codes_back(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    found = words(codes, bits)  # type: ignore[arg-type]
    assert found.dtype == torch.int32
    assert found.shape == (5, -(-columns * bits // 32))
    assert torch.equal(codes_of(found, bits, columns), codes)  # type: ignore[arg-type]


def test_compressed_tensors_packs_weights_along_inputs_and_zero_points_along_outputs() -> None:
    made = compressed_tensors_int4(counting())
    assert hexadecimal(made["weight_packed"])[:2] == [["76543210"], ["87654321"]]
    assert hexadecimal(made["weight_zero_point"]) == [["87654321"]]
    assert made["weight_scale"].flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert made["weight_shape"].tolist() == [8, 8]


def test_compressed_tensors_adds_half_the_range_to_8_bits() -> None:
    codes = torch.tensor([[-127, -1, 0, 1, 127]], dtype=torch.int8)
    made = compressed_tensors_int8(codes, torch.tensor([0.5]))
    # -127 + 128 = 01, -1 -> 7f, 0 -> 80, 1 -> 81, 127 -> ff
    assert hexadecimal(made["weight_packed"]) == [["81807f01", "000000ff"]]
    assert made["weight_scale"].tolist() == [[0.5]]
    assert made["weight_shape"].tolist() == [1, 5]


def test_gptq_is_transposed_and_its_first_format_stores_zero_points_less_1() -> None:
    made = gptq(counting(), first_format=True)
    assert hexadecimal(made["qweight"])[0][:2] == ["76543210", "87654321"]
    assert hexadecimal(made["qzeros"]) == [["76543210"]]
    assert hexadecimal(gptq(counting(), first_format=False)["qzeros"]) == [["87654321"]]
    assert made["scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert made["g_idx"].tolist() == [0] * 8


def test_awq_interleaves_the_outputs_of_a_word() -> None:
    made = awq(counting())
    # Input 0 has the codes 0 to 7: places 0 to 7 hold those of outputs 0, 2, 4, 6, 1, 3, 5, 7.
    assert hexadecimal(made["qweight"])[0] == ["75316420"]
    assert hexadecimal(made["qzeros"]) == [["86427531"]]
    assert made["scales"].shape == (1, 8)


@pytest.mark.parametrize("size", [16, 64])
def test_readers_of_other_tools_find_the_same_weight(size: int) -> None:
    weight = rounded(size=size)
    half = Grouped(weight.codes, weight.scale.half().float(), weight.zero_point)
    assert torch.equal(read_gptq(gptq(weight, first_format=True), added=1), half.dequantized())
    assert torch.equal(read_gptq(gptq(weight, first_format=False), added=0), half.dequantized())
    assert torch.equal(read_awq(awq(weight)), half.dequantized())
    made = compressed_tensors_int4(weight)
    codes = codes_of(made["weight_packed"], 4, 64)
    zeros = codes_of(made["weight_zero_point"].t(), 4, 24).t()
    assert torch.equal(Grouped(codes, made["weight_scale"], zeros).dequantized(), weight.dequantized())


def test_a_zero_point_of_0_has_no_code_in_gptqs_first_format() -> None:
    positive = nearest(torch.rand(8, 16) + 1, 16)
    assert not positive.zero_point.any()
    with pytest.raises(AssertionError, match="no code"):
        gptq(positive, first_format=True)
    assert torch.equal(
        read_gptq(gptq(positive, first_format=False), added=0),
        Grouped(positive.codes, positive.scale.half().float(), positive.zero_point).dequantized(),
    )


def test_smaller_groups_say_the_same() -> None:
    weight = rounded(size=32)
    finer = in_groups_of(weight, 16)
    assert finer.scale.shape == finer.zero_point.shape == (24, 4)
    assert torch.equal(finer.dequantized(), weight.dequantized())
