"""PiToMe, CrossGET, EViT and pooling by hand, and the laws they share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.complete_matching import energies, energy_matching, guided_matching
from mmcompress.ops.fusing import fused, neighbours
from mmcompress.ops.merging import merge

Method = Callable[[Tensor, int, int], Tensor]
METHODS: dict[str, Method] = {
    "pitome": energy_matching,
    "crossget": lambda keys, merged, protected: guided_matching(keys, merged, protected)[0],
    "evit": lambda keys, merged, protected: fused(keys[..., 0].abs(), merged, protected)[0],
    "pool": lambda keys, merged, protected: neighbours(keys.shape[1], merged, protected).expand(len(keys), -1, -1),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
PITOME = torch.tensor([[1, 0], [0.98, 0.2], [0.95, 0.3], [0, 1], [-1, 0], [-0.6, -0.8]]).double()[None]


def members(assignment: Tensor) -> list[list[int]]:
    """The columns of every row of the first sample."""
    return [row.nonzero().flatten().tolist() for row in assignment[0]]


def angles(*degrees: float) -> Tensor:
    turned = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([turned.cos(), turned.sin()], dim=-1)[None]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pitome_golden() -> None:
    unit = PITOME / PITOME.norm(dim=-1, keepdim=True)
    expected = torch.tensor([-0.3312, -0.3140, -0.3109, -0.4764, -0.5490, -0.5634]).double()
    assert torch.allclose(energies(unit @ unit.mT, 0.9, torch.ones(1, 6).double())[0], expected, atol=5e-5)
    assert members(energy_matching(PITOME, 1)) == [[0], [1, 2], [3], [4], [5]]
    # By energy 2, 1, 0, 3: the first and the third go, each to the more similar of the others.
    assert members(energy_matching(PITOME, 2)) == [[0, 1, 2], [3], [4], [5]]


def test_crossget_golden() -> None:
    """The class token points to 0 degrees. Of the best friends at 90 and 95 the first goes; then the second finds 10 nearest."""
    keys = angles(0, 0, 10, 90, 95)
    assignment, weights = guided_matching(keys, 1, 1)
    assert members(assignment) == [[0], [1], [2], [3, 4]]
    assert torch.allclose(weights[0, 1:].log(), angles(0, 10, 90, 95)[0, :, 0])
    assert weights[0, 0] == 1
    assert members(guided_matching(keys, 2, 1)[0]) == [[0], [1], [2, 3, 4]]
    # Without a class token the mean points to 49 degrees. Costs: 0: .66 - .98 = -.33; 90: .75 - 1 = -.25. 0 goes first.
    assert members(guided_matching(keys[:, 1:], 1)[0]) == [[0, 1], [2], [3]]


def test_evit_golden() -> None:
    scores = torch.tensor([[0.0, 0.1, 0.4, 0.05, 0.2, 0.25]])
    assignment, weights = fused(scores, 2, 1)
    assert members(assignment) == [[0], [2], [5], [1, 3, 4]]
    tokens = torch.eye(6)[None]
    made, sizes = merge(tokens, assignment, None, weights)
    assert torch.allclose(made[0, -1], torch.tensor([0, 0.1, 0, 0.05, 0.2, 0]) / 0.35, atol=1e-4)
    assert sizes.tolist() == [[1, 1, 1, 3]]


def test_pool_golden() -> None:
    def rows(*given: int) -> list[list[int]]:
        return members(neighbours(*given)[None])

    assert rows(7, 1, 1) == [[0], [1], [2], [3, 4], [5], [6]]
    assert rows(7, 3, 1) == [[0], [1, 2], [3, 4], [5, 6]]
    assert rows(5, 2, 0) == [[0, 1], [2, 3], [4]]


@every_method
@pytest.mark.parametrize("protected", [0, 1, 5])
def test_every_token_goes_to_one_row_and_protected_ones_stay_alone_and_first(method: Method, protected: int) -> None:
    keys = noise(3, 18, 4)
    for merged in range((18 - protected) // 2 + 1):
        assignment = method(keys, merged, protected)
        assert assignment.shape == (3, 18 - merged, 18)
        assert torch.equal(assignment.sum(1), torch.ones(3, 18))
        assert torch.all(assignment.sum(2) >= 1)
        assert torch.equal(assignment[:, :protected], torch.eye(18)[:protected].expand(3, -1, -1))
    assert torch.equal(method(keys, 0, protected), torch.eye(18).expand(3, -1, -1))
    with pytest.raises(UsageError, match="the limit is"):
        method(keys, (18 - protected) // 2 + 1, protected)


@every_method
def test_a_batch_equals_its_samples_and_no_gradient_flows(method: Method) -> None:
    keys = noise(4, 21, 8).requires_grad_()
    together = method(keys, 6, 1)
    assert not together.requires_grad
    for index in range(4):
        assert torch.equal(method(keys[index : index + 1], 6, 1)[0], together[index])


@every_method
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens_give_no_nan_and_merge_by_place(method: Method, value: float) -> None:
    assignment = method(torch.full((1, 9, 4), value), 3, 1)
    assert torch.equal(assignment.sum(1), torch.ones(1, 9))


@pytest.mark.parametrize(
    "method",
    [
        lambda keys, merged, sizes: energy_matching(keys, merged, sizes=sizes),
        lambda keys, merged, sizes: guided_matching(keys, merged, sizes=sizes)[0],
    ],
    ids=["pitome", "crossget"],
)
def test_padding_merges_first_and_has_no_say(method: Callable[[Tensor, int, Tensor], Tensor]) -> None:
    keys = noise(2, 12, 4)
    sizes = torch.ones(2, 12)
    sizes[:, 8:] = 0
    for filling in (keys[:, :1], noise(2, 4, 4, seed=9)):
        keys[:, 8:] = filling
        assignment = method(keys, 2, sizes)
        assert all(len([token for token in group if token < 8]) <= 1 for group in members(assignment))
        # More than there is padding: real tokens merge, and none of them into padding alone.
        groups = members(method(keys, 5, sizes))
        assert sum(len([token for token in group if token < 8]) >= 2 for group in groups) >= 1


def test_weights_say_what_counts_in_a_mean_and_not_in_its_size() -> None:
    tokens = torch.tensor([[[2.0], [4.0], [8.0]]])
    rows = torch.tensor([[[1.0, 1, 0], [0, 0, 1]]])
    made, sizes = merge(tokens, rows, torch.tensor([[1.0, 2, 1]]), torch.tensor([[3.0, 0.5, 0.1]]))
    assert torch.allclose(made, torch.tensor([[[(2 * 3 + 4 * 2 * 0.5) / 4], [8.0]]]))
    assert sizes.tolist() == [[3, 1]]
