import pytest
import torch
from torch import Tensor

from mmcompress.ops import brain_surgeon
from mmcompress.ops.brain_surgeon import eliminate, removal_costs, surgeon_scores
from mmcompress.ops.reconstruction import Moments, conditioned, repair


def _case(units: int = 6, width: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (tokens, C) that depend on one another, and weights (3, C)."""
    torch.manual_seed(seed)
    channels = units * width
    inputs = torch.randn(300, channels, dtype=torch.float64) @ torch.randn(channels, channels, dtype=torch.float64)
    return inputs, torch.randn(3, channels, dtype=torch.float64)


def _second(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def _residual(inputs: Tensor, weight: Tensor, kept: list[int]) -> float:
    """What the best weights on the `kept` channels leave of the output, measured."""
    wanted = inputs @ weight.T
    best = torch.linalg.lstsq(inputs[:, kept], wanted).solution
    return float((inputs[:, kept] @ best - wanted).square().sum(1).mean())


def test_sparsegpt_golden() -> None:
    # methods.md 3.3: H = [[2, 1], [1, 2]], w = (1, 2). Its inverse is [[2, -1], [-1, 2]] / 3.
    weight, inverse = torch.tensor([[1.0, 2]]), torch.tensor([[2.0, -1], [-1, 2]]) / 3
    torch.testing.assert_close(removal_costs(weight, inverse, 2), torch.tensor([1.5, 6.0]))
    refitted, left = eliminate(weight, inverse, torch.tensor([0]))
    torch.testing.assert_close(refitted, torch.tensor([[2.5]]))
    torch.testing.assert_close(left, torch.tensor([[0.5]]))
    # SparseGPT's second score has the inverse without column 0, and the weight as it was.
    torch.testing.assert_close(removal_costs(weight[:, 1:], left, 1), torch.tensor([8.0]))
    # Refitted it is 2.5^2 / 0.5; both together are all there is: w' H w = 2 + 2 * 2 + 8.
    scores = surgeon_scores(weight, torch.tensor([[2.0, 1], [1, 2]]), 2)
    torch.testing.assert_close(scores, torch.tensor([1.5, 12.5], dtype=torch.float64))


@pytest.mark.parametrize(("units", "width"), [(6, 1), (4, 3)])
def test_the_cost_of_a_unit_is_what_least_squares_really_leaves(units: int, width: int) -> None:
    inputs, weight = _case(units, width)
    found = removal_costs(weight, torch.linalg.inv(_second(inputs)), units)
    for unit in range(units):
        kept = [c for c in range(units * width) if c // width != unit]
        assert float(found[unit]) == pytest.approx(_residual(inputs, weight, kept))


@pytest.mark.parametrize(("units", "width"), [(6, 1), (4, 3)])
def test_scores_sum_up_to_the_growth_of_the_error_as_units_go(units: int, width: int) -> None:
    inputs, weight = _case(units, width)
    scores = surgeon_scores(weight, _second(inputs), units)
    order = scores.argsort().tolist()
    assert scores[order].diff().min() > 0
    for count in range(1, units):
        gone = order[:count]
        kept = [c for c in range(units * width) if c // width not in gone]
        assert float(scores[gone].sum()) == pytest.approx(_residual(inputs, weight, kept), rel=1e-6)


def test_looking_for_candidates_a_few_times_only_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = _case(200)
    residuals = []
    for rounds in (200, brain_surgeon.ROUNDS):
        monkeypatch.setattr(brain_surgeon, "ROUNDS", rounds)
        order = surgeon_scores(weight, _second(inputs), 200).argsort()
        residuals.append(_residual(inputs, weight, order[100:].tolist()))
    at_random = _residual(inputs, weight, torch.randperm(200)[100:].tolist())
    assert residuals[1] == pytest.approx(residuals[0], rel=0.1)
    assert residuals[1] < 0.5 * at_random


def test_the_first_to_go_is_the_best_single_choice() -> None:
    inputs, weight = _case()
    residuals = [_residual(inputs, weight, [c for c in range(6) if c != gone]) for gone in range(6)]
    scores = surgeon_scores(weight, _second(inputs), 6)
    assert int(scores.argmin()) == residuals.index(min(residuals))
    assert float(scores.min()) == pytest.approx(min(residuals))


@pytest.mark.parametrize("units", [6, 200])
def test_one_of_two_that_say_the_same_is_worth_nothing(units: int) -> None:
    """Also where several go between two looks: 200 units go in steps of four."""
    inputs, weight = _case(units)
    inputs[:, 4] = inputs[:, 1] + 1e-5 * torch.randn(len(inputs), dtype=torch.float64)
    pair = surgeon_scores(weight, _second(inputs) + 1e-12 * torch.eye(units), units)[[1, 4]].sort().values
    alone = [unit for unit in range(units) if unit != 4]
    weight[:, 1] += weight[:, 4]
    single = surgeon_scores(weight[:, alone], _second(inputs[:, alone]), units - 1)[1]
    assert pair[0] < 1e-6
    assert pair[1] > 1e-3
    assert float(pair[1]) == pytest.approx(float(single), rel=0.2)


def test_scores_follow_a_permutation_of_units() -> None:
    inputs, weight = _case(5, 2)
    order = torch.randperm(5)
    columns = (order[:, None] * 2 + torch.arange(2)).flatten()
    plain = surgeon_scores(weight, _second(inputs), 5)
    torch.testing.assert_close(surgeon_scores(weight[:, columns], _second(inputs[:, columns]), 5), plain[order])


def test_what_it_foresees_is_what_the_repair_leaves() -> None:
    """With a bias to take the mean, on the shrunk covariance with its ridge: the repair's own error, and the ridge's price."""
    inputs, weight = _case()
    inputs = inputs + torch.arange(6.0)
    bias, ridge = torch.zeros(3, dtype=torch.float64), 0.01
    moments = Moments(inputs.mean(0), _second(inputs), 40)
    given = conditioned(Moments(moments.mean, _second(inputs), 40), centred=True, ridge=ridge)
    costs = removal_costs(weight, torch.linalg.inv(given), 6)
    for unit in range(6):
        kept = torch.tensor([c for c in range(6) if c != unit])
        new, _ = repair(weight, bias, kept, Moments(moments.mean, _second(inputs), 40), ridge)
        change = torch.zeros_like(weight)
        change[:, kept] = new
        difference = change - weight
        assert float(costs[unit]) == pytest.approx(float((difference @ given * difference).sum()))
