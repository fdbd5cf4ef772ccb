import pytest
import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.matching import bipartite_soft_matching

GOLDEN = torch.tensor([[1, 0], [1, 0.1], [0.9, 0.2], [0, 1], [0.1, 1], [-1, 0.3]])[None]


def members(assignment: Tensor) -> list[list[int]]:
    """The columns of every row of the first sample."""
    return [row.nonzero().flatten().tolist() for row in assignment[0]]


def test_golden() -> None:
    # cos(2, 1) = .9929, cos(4, 3) = .9950 are the best of tokens 2 and 4; 4 goes first.
    assert members(bipartite_soft_matching(GOLDEN, 2, 1)) == [[0], [1, 2], [3, 4], [5]]
    assert members(bipartite_soft_matching(GOLDEN, 1, 1)) == [[0], [2], [1], [3, 4], [5]]
    assert members(bipartite_soft_matching(GOLDEN, 0, 1)) == [[0], [2], [4], [1], [3], [5]]


def test_scale_of_keys_does_not_matter() -> None:
    scaled = GOLDEN * torch.tensor([1, 5, 0.01, 7, 100, 3])[None, :, None]
    assert torch.equal(bipartite_soft_matching(scaled, 1, 1), bipartite_soft_matching(GOLDEN, 1, 1))


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [17, 18])
def test_every_token_goes_to_one_row_and_protected_ones_stay_alone_and_first(tokens: int, protected: int) -> None:
    keys = torch.randn(3, tokens, 4, generator=torch.Generator().manual_seed(0))
    for merged in range((tokens - protected) // 2 + 1):
        assignment = bipartite_soft_matching(keys, merged, protected)
        assert assignment.shape == (3, tokens - merged, tokens)
        assert torch.equal(assignment.sum(1), torch.ones(3, tokens))
        assert torch.all(assignment.sum(2) >= 1)
        assert torch.equal(assignment[:, :protected], torch.eye(tokens)[:protected].expand(3, -1, -1))


def test_the_most_similar_pairs_merge() -> None:
    keys = torch.randn(1, 33, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = keys[0] / keys[0].norm(dim=-1, keepdim=True)
    similarity = unit[2::2] @ unit[1::2].T  # one class token: A is 2, 4, …; B is 1, 3, …
    best, partner = similarity.max(1)
    sources = {2 + 2 * int(i): 1 + 2 * int(partner[i]) for i in best.argsort(descending=True)[:5]}
    groups = members(bipartite_soft_matching(keys, 5, 1))
    for source, destination in sources.items():
        assert any(source in group and destination in group for group in groups)
    assert sum(len(group) - 1 for group in groups) == 5


def test_ties_are_broken_by_position() -> None:
    # A blank image: every similarity is 1. The first A tokens go, all of them into the first B token.
    groups = members(bipartite_soft_matching(torch.ones(1, 9, 4), 2, 1))
    assert groups == [[0], [6], [8], [1, 2, 4], [3], [5], [7]]


def test_padding_merges_first_and_attracts_nothing() -> None:
    keys = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(2))
    keys[:, 8:] = keys[:, :1]  # padding that looks exactly like a real token
    sizes = torch.ones(2, 12)
    sizes[:, 8:] = 0
    groups = members(bipartite_soft_matching(keys, 2, 0, sizes))
    assert all(len([token for token in group if token < 8]) == 1 for group in groups[:-2])
    assert [9] in groups[-2:]
    assert [11] in groups[-2:]
    # One more than the padding on side A: a real pair merges, and not into padding.
    groups = members(bipartite_soft_matching(keys, 3, 0, sizes))
    assert sum(len([token for token in group if token < 8]) == 2 for group in groups) == 1
    assert all(group in groups for group in ([9], [11]))


def test_zero_keys_give_no_nan() -> None:
    assignment = bipartite_soft_matching(torch.zeros(1, 7, 4), 3, 1)
    assert torch.equal(assignment.sum(1), torch.ones(1, 7))


def test_a_batch_equals_its_samples_and_no_gradient_flows() -> None:
    keys = torch.randn(4, 21, 8, requires_grad=True)
    together = bipartite_soft_matching(keys, 6, 1)
    assert not together.requires_grad
    for index in range(4):
        assert torch.equal(together[index], bipartite_soft_matching(keys[index : index + 1], 6, 1)[0])


def test_after_inference_mode_training_still_works() -> None:
    with torch.inference_mode():
        bipartite_soft_matching(torch.randn(1, 23, 4), 3, 1)
    values = torch.randn(1, 23, 4, requires_grad=True)
    (bipartite_soft_matching(values, 3, 1) @ values).sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_give_whole_sizes(dtype: torch.dtype) -> None:
    assignment = bipartite_soft_matching(torch.ones(1, 1025, 4, dtype=dtype), 512, 1)
    assert assignment.dtype == torch.float32
    assert assignment.sum(2).max() == 513
    small = torch.randn(1, 9, 4).mul(1e-4).to(dtype)
    assert torch.equal(bipartite_soft_matching(small, 2, 1), bipartite_soft_matching(small.float() * 1e4, 2, 1))


def test_more_than_half_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot merge 4 of 8 tokens with 1 protected; the limit is 3"):
        bipartite_soft_matching(torch.randn(1, 8, 4), 4, 1)
