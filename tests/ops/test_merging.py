import pytest
import torch

from mmcompress.ops.matching import bipartite_soft_matching
from mmcompress.ops.merging import log_size_bias, merge, unmerge


def example(tokens: int = 15, merged: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64)
    return values, bipartite_soft_matching(values, merged, 1)


def test_golden() -> None:
    keys = torch.tensor([[1, 0], [1, 0.1], [0.9, 0.2], [0, 1], [0.1, 1], [-1, 0.3]])[None]
    values = torch.arange(0.0, 60.0, 10.0)[None, :, None]
    means, sizes = merge(values, bipartite_soft_matching(keys, 2, 1))
    assert means.flatten().tolist() == [0, 15, 35, 50]
    assert sizes.flatten().tolist() == [1, 2, 2, 1]


def test_means_weigh_by_size() -> None:
    # Sizes 3 and 1 of values 0 and 8: (3 * 0 + 1 * 8) / 4 = 2.
    means, sizes = merge(torch.tensor([[[0.0], [8.0]]]), torch.ones(1, 1, 2), torch.tensor([[3.0, 1.0]]))
    assert means.item() == 2
    assert sizes.item() == 4


def test_sizes_add_up_to_the_tokens_there_were() -> None:
    values, assignment = example()
    tokens, sizes = merge(values, assignment)
    for _ in range(2):
        tokens, sizes = merge(tokens, bipartite_soft_matching(tokens, 3, 1), sizes)
        assert sizes.sum(1).tolist() == [15, 15]


def test_two_merges_give_the_mean_of_all_members() -> None:
    values, assignment = example()
    tokens, sizes = merge(values, assignment)
    second = bipartite_soft_matching(tokens, 4, 1)
    tokens, sizes = merge(tokens, second, sizes)
    members = second @ assignment  # (B, M, N)
    assert torch.allclose(tokens, members @ values / members.sum(-1, keepdim=True), atol=1e-14)
    assert torch.equal(sizes, members.sum(-1))


def test_unmerge_returns_means_and_keeps_the_total() -> None:
    values, assignment = example()
    tokens, _ = merge(values, assignment)
    back = unmerge(tokens, assignment)
    assert back.shape == values.shape
    assert torch.allclose(back.mean(1), values.mean(1), atol=1e-14)
    assert torch.allclose(merge(back, assignment)[0], tokens, atol=1e-14)
    alone = (assignment.sum(2, keepdim=True) * assignment).sum(1) == 1
    assert torch.equal(back[alone], values[alone])


def test_merging_nothing_permutes_bit_by_bit() -> None:
    values, _ = example()
    assignment = bipartite_soft_matching(values, 0, 1)
    tokens, _ = merge(values, assignment)
    assert torch.equal(unmerge(tokens, assignment), values)


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_equal_tokens_weigh_as_one_token_of_their_number(copies: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 6, 8, generator=generator, dtype=torch.float64)
    value = torch.randn(1, 6, 8, generator=generator, dtype=torch.float64)
    number = torch.tensor([1, copies, 1, 1, copies, 1])
    many = [part.repeat_interleave(number, dim=1) for part in (key, value)]
    expected = torch.softmax(query @ many[0].mT, -1) @ many[1]
    bias = log_size_bias(number[None].double(), torch.float64, padded=False)
    got = torch.softmax(query @ key.mT + bias[:, None], -1) @ value
    assert (got - expected).abs().max() <= 1e-12


def test_padding_has_no_weight_and_gives_no_nan() -> None:
    sizes = torch.tensor([[1.0, 4.0, 0.0, 0.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        bias = log_size_bias(sizes, dtype, padded=True)
        assert bias.dtype == dtype
        assert torch.isfinite(bias).all()
        shares = torch.softmax(bias.float(), -1)
        assert torch.allclose(shares, torch.tensor([[0.2, 0.8, 0, 0]]), atol=1e-2)
        assert shares[0, 2:].tolist() == [0, 0]
    means, total = merge(torch.randn(1, 4, 3), torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 1]]]), sizes)
    assert torch.equal(means[0, 1], torch.zeros(3))
    assert total.tolist() == [[5, 0]]
    with_padding = merge(torch.tensor([[[3.0], [9.0]]]), torch.ones(1, 1, 2), torch.tensor([[1.0, 0.0]]))[0]
    assert with_padding.item() == 3


def test_without_proportional_attention_only_padding_is_hidden() -> None:
    bias = log_size_bias(torch.tensor([[1.0, 4.0, 0.0]]), torch.float32, padded=True, proportional=False)
    assert bias.tolist() == [[0, 0, -30000]]


def test_gradients_are_shared_by_size() -> None:
    values = torch.zeros(1, 2, 1, requires_grad=True)
    merge(values, torch.ones(1, 1, 2), torch.tensor([[3.0, 1.0]]))[0].sum().backward()
    assert values.grad is not None
    assert values.grad.flatten().tolist() == [0.75, 0.25]
