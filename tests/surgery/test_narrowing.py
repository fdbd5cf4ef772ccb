"""Which norms commute with rotations is found out by trying, not by their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmcompress.surgery.linears import keep_rows
from mmcompress.surgery.narrowing import (
    centres,
    give_bias,
    is_rms_norm,
    narrow_norm,
    narrow_rows,
    with_product,
    without_gain,
)


class SliceNorm(nn.Module):
    """Divides by the root of the sum, not of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("norm", "is_one"),
    [
        (LlamaRMSNorm(12), True),
        (nn.RMSNorm(12, eps=1e-6), True),
        (nn.LayerNorm(12), False),
        (nn.LayerNorm(12, bias=False), False),
        (GemmaRMSNorm(12), False),
        (SliceNorm(), False),
        (nn.Identity(), False),
    ],
)
def test_only_rms_norms_with_a_plain_gain(norm: nn.Module, is_one: bool) -> None:
    assert is_rms_norm(norm) is is_one


def test_a_copy_without_gain_is_not_called_through_the_norms_hooks() -> None:
    norm = LlamaRMSNorm(4)
    with torch.no_grad():
        norm.weight.mul_(3)
    plain, called = without_gain(norm), []
    norm.register_forward_pre_hook(lambda *_: called.append(1))
    torch.testing.assert_close(plain(torch.tensor([[2.0, -2, 2, 2]])), torch.tensor([[1.0, -1, 1, 1]]))
    assert not called
    assert float(norm.weight.detach().mean()) == 3


def test_rows_of_a_table_become_shorter() -> None:
    table = nn.Embedding(5, 4, padding_idx=0)
    before = table.weight.detach().clone()
    narrow_rows(table, "weight", 3)
    assert (table.embedding_dim, table.padding_idx) == (3, 0)
    assert torch.equal(table.weight, before[:, :3])
    assert table(torch.tensor([1])).shape == (1, 3)


def test_layer_norms_become_narrower_and_are_looked_at_without_gain_and_bias() -> None:
    norm = nn.LayerNorm(4, eps=1e-12)
    with torch.no_grad():
        norm.weight.mul_(3)
        norm.bias.add_(2)
    states = torch.tensor([[4.0, 2, 4, 2]])
    torch.testing.assert_close(without_gain(norm)(states), torch.tensor([[1.0, -1, 1, -1]]))
    assert norm.bias.tolist() == [2, 2, 2, 2]
    narrow_norm(norm, 2)
    torch.testing.assert_close(norm(torch.tensor([[4.0, 2]])), torch.tensor([[5.0, -1]]))
    for kind in (nn.LayerNorm(4, bias=False), nn.RMSNorm(4)):
        narrow_norm(kind, 2)
        assert kind(torch.ones(1, 2)).shape == (1, 2)
        without_gain(kind)


@pytest.mark.parametrize(
    ("norm", "is_one"),
    [
        (nn.LayerNorm(4), True),
        (nn.LayerNorm(4, bias=False), True),
        (nn.LayerNorm(4, elementwise_affine=False), False),
        (nn.LayerNorm((3, 4)), False),
        (nn.RMSNorm(4), False),
        (LlamaRMSNorm(4), False),
    ],
)
def test_only_layer_norms_over_channels_take_a_mean_off(norm: nn.Module, is_one: bool) -> None:
    assert centres(norm) is is_one


def test_products_and_biases_begin_as_nothing() -> None:
    norm = nn.LayerNorm(4).double().eval()
    norm.weight.requires_grad_(False)
    made = with_product(norm, 3, bias=True)
    assert made[0] is norm
    assert (made[1].in_features, made[1].out_features, made[1].weight.dtype) == (4, 3, torch.float64)
    assert not made.training
    assert not any(tensor.any() or tensor.requires_grad for tensor in made[1].parameters())
    assert with_product(norm, 3)[1].bias is None
    linear = nn.Linear(2, 3)
    bias = linear.bias
    give_bias(linear)
    assert linear.bias is bias


def test_a_convolution_gives_fewer_channels() -> None:
    patches = nn.Conv2d(3, 4, kernel_size=2, stride=2)
    image = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = patches(image)
    keep_rows(patches, torch.tensor([0, 2]))
    torch.testing.assert_close(patches(image), before[:, [0, 2]])
    assert patches.out_channels == 2
