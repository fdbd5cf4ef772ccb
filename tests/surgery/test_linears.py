import torch
from torch import nn

from mmcompress.surgery.linears import keep_columns, keep_rows, spread


def test_keep_rows_and_columns_by_hand() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        linear.bias.copy_(torch.tensor([7.0, 8]))
    keep_rows(linear, torch.tensor([1]))
    keep_columns(linear, torch.tensor([0, 2]))
    assert linear.weight.tolist() == [[4, 6]]
    assert linear.bias.tolist() == [8]
    assert (linear.in_features, linear.out_features) == (2, 1)
    assert linear(torch.ones(1, 2)).tolist() == [[18]]


def test_spread() -> None:
    assert spread(torch.tensor([0, 3]), 2).tolist() == [0, 1, 6, 7]
    assert spread(torch.tensor([4, 5]), 1).tolist() == [4, 5]


def test_dtype_flags_and_missing_bias_stay() -> None:
    linear = nn.Linear(4, 4, bias=False, dtype=torch.float16).requires_grad_(False)
    keep_rows(linear, torch.tensor([0, 2]))
    assert linear.weight.dtype == torch.float16
    assert not linear.weight.requires_grad
    assert linear.bias is None


def test_meta() -> None:
    linear = nn.Linear(4, 4, device="meta")
    keep_rows(linear, torch.tensor([0, 2]))
    keep_columns(linear, torch.tensor([3]))
    assert linear.weight.is_meta
    assert linear.weight.shape == (2, 1)
    assert linear.bias.shape == (2,)
