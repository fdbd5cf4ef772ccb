import pytest
import torch

from mmcompress.ops.reconstruction import Moments, repair, shrinkage


def _case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    inputs = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + torch.arange(8.0)
    return inputs, torch.randn(5, 8, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


def _moments(inputs: torch.Tensor, count: float = 1e12) -> Moments:
    return Moments(inputs.mean(0), inputs.T @ inputs / len(inputs), count)


def _error(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, new: tuple, kept: torch.Tensor
) -> float:
    have = torch.nn.functional.linear(inputs[:, kept], *new)
    return float((have - torch.nn.functional.linear(inputs, weight, bias)).square().mean())


def test_bias_by_hand() -> None:
    # Channel 1 has mean 3 and weight 2: its part of the output, 6, goes into the bias.
    weight, bias = repair(
        torch.tensor([[1.0, 2]]), torch.tensor([0.5]), torch.tensor([0]), Moments(torch.tensor([7.0, 3])), 0
    )
    assert weight.tolist() == [[1]]
    assert bias is not None
    assert bias.tolist() == [6.5]


def test_a_copy_of_a_kept_channel_is_taken_over_exactly() -> None:
    inputs, weight, bias = _case()
    inputs[:, 3] = 2 * inputs[:, 1] + 5
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    new = repair(weight, bias, kept, _moments(inputs), 0)
    torch.testing.assert_close(new[0][:, 1], weight[:, 1] + 2 * weight[:, 3])
    assert _error(inputs, weight, bias, new, kept) < 1e-15


@pytest.mark.parametrize("ridge", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_each_level_is_no_worse_than_the_one_before(seed: int, ridge: float) -> None:
    inputs, weight, bias = _case(seed)
    kept = torch.tensor([0, 2, 3, 6])
    none = _error(inputs, weight, bias, (weight[:, kept], bias), kept)
    folded = _error(inputs, weight, bias, repair(weight, bias, kept, Moments(inputs.mean(0)), ridge), kept)
    refitted = _error(inputs, weight, bias, repair(weight, bias, kept, _moments(inputs), ridge), kept)
    assert refitted <= folded <= none
    # Without a bias to write to, the uncentred fit is still no worse than nothing.
    bare = _error(inputs, weight, None, repair(weight, None, kept, _moments(inputs), ridge), kept)
    assert bare <= _error(inputs, weight, None, (weight[:, kept], None), kept)


def test_least_squares_is_the_optimum() -> None:
    inputs, weight, bias = _case()
    kept = torch.tensor([1, 4, 5])
    new_weight, new_bias = repair(weight, bias, kept, _moments(inputs), 0)
    known = torch.cat([inputs[:, kept], torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(known, inputs @ weight.T + bias).solution.T
    torch.testing.assert_close(new_weight, best[:, :-1])
    torch.testing.assert_close(new_bias, best[:, -1])


def test_shrinkage_by_hand() -> None:
    # C = 2, eigenvalues 3 and 1: trace 4, squares 10; (0 * 10 + 16) / ((T + 1 - 1) * (10 - 8)) = 8 / T.
    covariance = torch.tensor([[2.0, 1], [1, 2]])
    assert shrinkage(covariance, 16) == pytest.approx(0.5)
    assert shrinkage(covariance, 4) == 1
    assert shrinkage(torch.eye(3), 100) == 1


def test_what_is_solved_is_the_shrunk_covariance() -> None:
    """With C = 2 and covariance ((2, 1), (1, 2)), 16 tokens shrink it by half (see above) to ((2, 0.5), (0.5, 2))."""
    covariance = torch.tensor([[2.0, 1], [1, 2]])
    weight, bias = torch.tensor([[3.0, 5.0]]), torch.tensor([7.0])
    moments = Moments(torch.zeros(2), covariance, 16)
    new_weight, new_bias = repair(weight, bias, torch.tensor([0]), moments, 0)
    # D = 5 * 0.5 / 2; unshrunk it would be 5 * 1 / 2.
    assert new_weight.tolist() == [[pytest.approx(3 + 1.25)]]
    assert new_bias is not None
    assert new_bias.tolist() == [7.0]


def test_few_tokens_are_not_overfitted() -> None:
    """Independent channels: there is nothing to take over, and from few tokens the repair must not think otherwise."""
    torch.manual_seed(0)
    seen, fresh = torch.randn(40, 30, dtype=torch.float64), torch.randn(4000, 30, dtype=torch.float64)
    weight, bias, kept = torch.randn(5, 30, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), torch.arange(20)
    folded = repair(weight, bias, kept, Moments(seen.mean(0)), 0)
    trusting = repair(weight, bias, kept, _moments(seen), 0)
    careful = repair(weight, bias, kept, _moments(seen, 40), 0)
    errors = [_error(fresh, weight, bias, new, kept) for new in (folded, careful, trusting)]
    assert errors[1] < 1.05 * errors[0] < errors[2]


@pytest.mark.parametrize("count", [3, 30, 300])
def test_shrinking_keeps_the_guarantee(count: int) -> None:
    inputs, weight, bias = _case()
    inputs = inputs[:count]
    kept = torch.tensor([0, 2, 3, 6])
    folded = _error(inputs, weight, bias, repair(weight, bias, kept, Moments(inputs.mean(0)), 0), kept)
    assert _error(inputs, weight, bias, repair(weight, bias, kept, _moments(inputs, count), 0.01), kept) <= folded


def test_a_large_ridge_gives_the_bias_alone_and_nothing_removed_changes_nothing() -> None:
    inputs, weight, bias = _case()
    kept = torch.tensor([1, 4, 5])
    stiff, folded = (
        repair(weight, bias, kept, _moments(inputs), 1e12),
        repair(weight, bias, kept, Moments(inputs.mean(0)), 0),
    )
    torch.testing.assert_close(stiff, folded)
    same = repair(weight, bias, torch.arange(8), _moments(inputs), 0.01)
    assert torch.equal(same[0], weight)
    assert same[1] is not None
    assert torch.equal(same[1], bias)
