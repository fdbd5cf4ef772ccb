"""MAC laws on running modules: the formula for a linear layer, attention in every form, exact after pruning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

from mmcompress.measure.macs import macs


class Tiny(nn.Module):
    """One transformer block of width 8, two heads, with a convolution in front; 3 x 8 x 8 pixels make 4 tokens."""

    def __init__(self, neurons: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, neurons), nn.Linear(neurons, 8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)  # (B, 4, 8)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        return self.down(self.up(mixed))


def by_hand(batch: int, neurons: int) -> int:
    return batch * (4 * 8 * 48 + 4 * 8 * 24 + 2 * 4 * 4 * 8 + 4 * 8 * neurons * 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_linear_layer_counts_b_n_c_m(batch: int) -> None:
    assert macs(nn.Linear(8, 5), torch.zeros(batch, 7, 8)).total == batch * 7 * 8 * 5
    assert macs(nn.Linear(8, 5, bias=False), {"input": torch.zeros(batch, 7, 8)}).total == batch * 7 * 8 * 5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_block_counts_what_is_worked_out_by_hand_with_its_parts(device: str) -> None:
    found = macs(Tiny().to(device), torch.zeros(3, 3, 8, 8, device=device))
    assert found.total == by_hand(3, 16)
    assert found.by_module["patches"] == 3 * 4 * 8 * 48
    assert found.by_module["up"] == found.by_module["down"] == 3 * 4 * 8 * 16
    assert found.by_module[""] == sum(found.by_op.values()) == found.total
    assert found.uncounted == {}


def test_the_recount_follows_pruning_exactly() -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    assert macs(Tiny(16), pixels).total - macs(Tiny(11), pixels).total == 2 * 4 * 8 * 5 * 2


def _query_key_value(kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, 6, 8), torch.zeros(2, kv_heads, 9, 8), torch.zeros(2, kv_heads, 9, 8)


@pytest.mark.parametrize("options", [{}, {"attn_mask": torch.zeros(2, 1, 6, 9)}, {"scale": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_counts_both_products_on_the_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = [part.to(dtype) for part in _query_key_value()]
    options = {name: value.to(dtype) if name == "attn_mask" else value for name, value in options.items()}
    assert macs(lambda q, k, v: attention(q, k, v, **options), inputs).total == 2 * (2 * 4 * 6 * 9 * 8)


def test_grouped_query_attention_counts_every_query_head() -> None:
    found = macs(lambda q, k, v: attention(q, k, v, enable_gqa=True), _query_key_value(kv_heads=2))
    assert found.total == 2 * (2 * 4 * 6 * 9 * 8)


@pytest.mark.parametrize("inference", [False, True])
def test_torch_multihead_attention_is_not_lost_in_its_fused_path(inference: bool) -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.zeros(2, 3, 8)
    with torch.inference_mode(inference):
        assert macs(layer, (x, x, x)).total == 4 * 2 * 3 * 8 * 8 + 2 * 2 * 3 * 3 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_torch_encoder_layer_is_counted() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    expected = 4 * 2 * 3 * 64 + 2 * 2 * 3 * 3 * 8 + 2 * 2 * 3 * 8 * 16
    assert macs(layer, torch.zeros(2, 3, 8)).total == expected


def test_products_torch_itself_does_not_count() -> None:
    integers = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 24, dtype=torch.int8)
    assert macs(torch._int_mm, integers).total == 32 * 16 * 24
    assert macs(torch.mv, (torch.zeros(3, 4), torch.zeros(4))).total == 12
    assert macs(torch.addmv, (torch.zeros(3), torch.zeros(3, 4), torch.zeros(4))).total == 12
    assert macs(torch.dot, (torch.zeros(5), torch.zeros(5))).total == 5
    assert macs(lambda a, b: torch.einsum("bnc,mc->bnm", a, b), (torch.zeros(2, 3, 8), torch.zeros(5, 8))).total == 240


def test_counting_leaves_the_module_alone_and_needs_no_gradients() -> None:
    module = Tiny()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (macs(module, torch.zeros(1, 3, 8, 8)) for _ in range(2))
    assert first == second
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
