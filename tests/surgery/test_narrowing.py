"""Which norms commute with rotations is found out by trying, not by their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmcompress.surgery.narrowing import is_rms_norm, narrow_rows, without_gain


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
