"""Experts of integers: their numbers by hand, the same in every form, and what they share with Linears."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress.surgery.experts import QuantizedExperts, common_group, own_group, quantized_layers, stacked_shape
from mmcompress.surgery.master_weights import Masters, holders
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from mmcompress.surgery.routing import through_every_expert
from tests.mixtures import dequantized, mixture, quantized

SCHEMES: list[dict[str, Any]] = [
    {"scheme": "W8A16"},
    {"scheme": "W4A16"},
    {"scheme": "W4A16", "size": 48},  # rows of 32 and of 48
    {"scheme": "W4A16", "rounding": "hqq"},
    {"scheme": "W4A16", "symmetric_experts": True},
]


def states(count: int = 9, width: int = 32) -> Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(1))


def test_eight_bits_by_hand() -> None:
    """Two experts of two neurons and two channels; an identity for the gate of the first, what is gated doubled."""
    block = mixture(2, 2, 2, 1)
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        block.experts.gate_up_proj[0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
        block.experts.gate_up_proj[1] = 127 * torch.ones(4, 2)
        block.experts.down_proj.copy_(torch.tensor([[[1.0, 0.0], [1.0, 127.0]], [[0.0, 0.0], [0.0, 254.0]]]))
    made = quantized(block, "W8A16").experts
    assert made.gate_up.weight_int8.tolist() == [[127, 0], [0, 127], [127, 0], [0, 127], *[[127, 127]] * 4]
    assert made.down.weight_int8.tolist() == [[127, 0], [1, 127], [0, 0], [0, 127]]
    torch.testing.assert_close(made.down.weight_scale, torch.tensor([1 / 127, 1.0, 1.0, 2.0]))
    # The first expert: silu(x) * 2x, of (1, -1) about (1.4621, 0.5379).
    x = torch.tensor([[1.0, -1.0]])
    inner = torch.nn.functional.silu(x) * 2 * x
    wanted = torch.tensor([[inner[0, 0], inner[0, 0] + 127 * inner[0, 1]]])
    torch.testing.assert_close(made(x, torch.tensor([[0]]), torch.ones(1, 1)), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", SCHEMES, ids=str)
def test_all_forms_compute_what_the_integers_stand_for(settings: dict[str, Any]) -> None:
    block = mixture()
    made = quantized(block, **settings)
    assert isinstance(made.experts, QuantizedExperts)
    plain, x = dequantized(block, made), states()
    assert not torch.equal(plain.experts.gate_up_proj, block.experts.gate_up_proj)
    wanted = plain(x)
    torch.testing.assert_close(made(x), wanted, rtol=0, atol=1e-6)
    assert (made(x) - block(x)).abs().max() > 1e-4
    with through_every_expert(made.experts.config):
        torch.testing.assert_close(made(x), wanted, rtol=0, atol=1e-6)
    # Each expert alone is three Linears.
    linears = {name: linear.weight for name, linear in made.experts.linears()}
    assert len(linears) == 4 * 3
    gate_up, down = plain.experts.gate_up_proj, plain.experts.down_proj
    assert torch.equal(torch.cat([linears["2.gate_proj"], linears["2.up_proj"]]), gate_up[2])
    assert torch.equal(linears["3.down_proj"], down[3])


def test_rounded_inputs_are_the_same_in_both_forms_and_near_the_floats() -> None:
    block, x = mixture(), states()
    made, floats = quantized(block, "W4A8"), quantized(block, "W4A16")
    rounded = made(x)
    assert 1e-5 < (rounded - floats(x)).abs().max() < 0.1
    with through_every_expert(made.experts.config):
        torch.testing.assert_close(made(x), rounded, rtol=0, atol=1e-6)


def test_symmetric_grids_have_the_middle_for_a_zero_point_and_seven_steps_each_side() -> None:
    block = mixture()
    down = quantized(block, "W4A16", symmetric_experts=True).experts.down
    grouped = down.grouped()
    assert torch.equal(grouped.zero_point, torch.full_like(grouped.zero_point, 8))
    largest = block.experts.down_proj.detach().reshape(-1, 3, 16).abs().amax(-1)
    torch.testing.assert_close(grouped.scale, largest / 7)
    assert int(grouped.codes.min()) >= 1
    assert int(grouped.codes.max()) == 15


def test_groups_are_those_both_stacks_can_have() -> None:
    def size(width: int, neurons: int, wanted: int) -> int:
        return common_group([torch.empty(1, 2, width), torch.empty(1, 2, neurons)], wanted)

    assert size(64, 96, 32) == 32
    assert size(64, 48, 32) == 16
    assert size(32, 24, 16) == 0
    assert size(64, 48, 0) == 64
    assert size(32, 24, 0) == 0
    assert [own_group(columns, 64) for columns in (64, 48, 128)] == [64, 48, 64]
    made = quantized(mixture(64, 48), "W4A16", size=64).experts
    # In a graph both have blocks of one size, the largest that divides 64 and 48.
    assert (made.gate_up.group_size, made.down.group_size, made.gate_up.block, made.down.block) == (64, 48, 16, 16)
    made = quantized(mixture(32, 24), "W8A16").experts
    assert (made.gate_up.block, made.down.block, made.gate_up.in_blocks) == (0, 0, False)


def test_shapes_and_layers_are_found_by_name() -> None:
    block = mixture()
    made = quantized(block, "W4A16")
    for name, shape in (("experts.gate_up_proj", (4, 96, 32)), ("experts.down_proj", (4, 32, 48))):
        assert stacked_shape(block, name) == stacked_shape(made, name) == shape
    assert quantized_layers(block) == {}
    found = quantized_layers(made)
    assert set(found) == {f"experts.{i}.{name}_proj" for i in range(4) for name in ("gate", "up", "down")}
    assert all(isinstance(layer, PackedLinear) and layer.of_experts for layer in found.values())


def test_gradients_flow_to_states_and_weights_of_the_router() -> None:
    block = mixture()
    made = quantized(block, "W8A16")
    x = states().requires_grad_()
    made(x).square().sum().backward()
    own = [x.grad, made.gate.weight.grad]
    other = dequantized(block, made)
    y = states().requires_grad_()
    other(y).square().sum().backward()
    for one, wanted in zip(own, [y.grad, other.gate.weight.grad], strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_integers_train_through_master_weights() -> None:
    block = quantized(mixture(), "W8A16")
    layers = holders(block)
    assert set(layers) == {"experts.gate_up", "experts.down"}
    before, x = block(states()).detach(), states()
    masters = Masters.of(layers, nn.Module())
    with masters.training():
        assert torch.equal(block(x), before)
        block(x).square().sum().backward()
        assert block.experts.down.master_weight.grad.abs().sum() > 0
        with torch.no_grad():
            block.experts.down.master_weight.mul_(0.5)
    assert masters.changed > 0
    torch.testing.assert_close(block(x), before / 2, rtol=0, atol=0.05)


def test_copies_and_meta_tensors() -> None:
    made = quantized(mixture(), "W4A16")
    twin = copy.deepcopy(made)
    twin.experts.down.weight_int4.zero_()
    assert bool(made.experts.down.weight_int4.any())
    empty = quantized(mixture().to("meta"), "W4A16")
    assert {name: value.shape for name, value in empty.state_dict().items()} == {
        name: value.shape for name, value in made.state_dict().items()
    }
    assert isinstance(quantized(mixture(), "W8A16").experts.gate_up, QuantizedLinear)
