import pytest
import torch
from torch import nn

from mmcompress.ops import importance


def test_wanda_golden() -> None:
    # methods.md 3.3
    weight = torch.tensor([[0.5, -0.2, 0.1, 0.4], [-0.3, 0.6, -0.1, 0.2]])
    found = importance.wanda(weight, torch.tensor([1, 3, 10, 0.5]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.6, 1, 0.2], [0.3, 1.8, 1, 0.1]]))
    # 50 % of each row keeps columns 1 and 2.
    assert found.topk(2, dim=1).indices.sort(1).values.tolist() == [[1, 2], [1, 2]]


def test_group_activation_by_hand() -> None:
    # Unit 0 is columns 0, 1: sqrt((3*1)^2 + (4*1)^2) = 5; unit 1 is columns 2, 3: sqrt((1*2)^2 + 0) = 2.
    found = importance.group_activation(torch.tensor([[3.0, 4, 1, 0]]), torch.tensor([1.0, 1, 2, 9]), units=2)
    assert found.tolist() == [5, 2]


def test_group_activation_is_the_output_energy_of_independent_channels() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200_000, 4) * torch.tensor([1.0, 2, 3, 4])
    weight = torch.randn(5, 4)
    energy = torch.stack([(inputs[:, u : u + 2] @ weight[:, u : u + 2].T).square().sum(1).mean() for u in (0, 2)])
    norms = inputs.square().mean(0).sqrt()
    torch.testing.assert_close(importance.group_activation(weight, norms, 2), energy.sqrt(), rtol=0.02, atol=0)


def test_group_magnitude_by_hand() -> None:
    # Two units: rows (1, 2) and (3, 4), biases 2 and 0, columns (0, 0) and (0, 5): sqrt(1+4+4) and sqrt(9+16+25).
    rows = [torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([2.0, 0])]
    found = importance.group_magnitude(rows, [torch.tensor([[0.0, 0], [0, 5]])], units=2)
    torch.testing.assert_close(found, torch.tensor([3.0, 50**0.5]))


def test_isotonic_regression_by_hand() -> None:
    found = importance.non_decreasing(torch.tensor([1.0, 3.0, 2.0, 6.0, 4.0, 2.0, 9.0]))
    assert found.tolist() == [1, 2.5, 2.5, 4, 4, 4, 9]
    falling = torch.tensor([5.0, 3.0, 1.0])
    assert importance.non_decreasing(falling).tolist() == [3, 3, 3]


def test_scores_follow_a_permutation_of_units() -> None:
    torch.manual_seed(0)
    units, width = 5, 3
    order = torch.randperm(units)
    columns = (order[:, None] * width + torch.arange(width)).flatten()
    writer, bias, reader, norms = torch.randn(15, 4), torch.randn(15), torch.randn(6, 15), torch.rand(15)
    plain = importance.group_magnitude([writer, bias], [reader], units)
    moved = importance.group_magnitude([writer[columns], bias[columns]], [reader[:, columns]], units)
    torch.testing.assert_close(moved, plain[order])
    plain = importance.group_activation(reader, norms, units)
    torch.testing.assert_close(importance.group_activation(reader[:, columns], norms[columns], units), plain[order])
    states, gradients = torch.randn(2, 7, 15), torch.randn(2, 7, 15)
    plain = importance.gate_gradients(states, gradients, units)
    moved = importance.gate_gradients(states[..., columns], gradients[..., columns], units)
    torch.testing.assert_close(moved, plain[:, order])


@pytest.mark.parametrize("shape", [(3, 7, 6), (3, 6), (3, 2, 4, 6)])
def test_gate_gradients_equal_the_gradient_of_a_gate(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    states = torch.randn(shape, requires_grad=True)
    gate = torch.ones(shape[0], 2, requires_grad=True)
    weight = torch.randn(6, 5)

    def loss(seen: torch.Tensor) -> torch.Tensor:
        return (seen @ weight).tanh().square().sum()

    gated = states.unflatten(-1, (2, 3)) * gate.view(shape[0], *[1] * (len(shape) - 2), 2, 1)
    wanted = torch.autograd.grad(loss(gated.flatten(-2)), gate)[0]
    (gradient,) = torch.autograd.grad(loss(states), states)
    torch.testing.assert_close(importance.gate_gradients(states.detach(), gradient, 2), wanted)


def test_gate_gradients_equal_weight_times_gradient_over_the_readers_columns() -> None:
    torch.manual_seed(0)
    reader, states = nn.Linear(6, 3), torch.randn(4, 5, 6, requires_grad=True)
    reader(states).tanh().sum().backward()
    assert states.grad is not None
    assert reader.weight.grad is not None
    by_weights = (reader.weight * reader.weight.grad).sum(0).view(2, 3).sum(1)
    found = importance.gate_gradients(states.detach(), states.grad, 2).sum(0)
    torch.testing.assert_close(found, by_weights.detach())


def test_block_influence_golden() -> None:
    # methods.md, appendix: one of two tokens turns by 45 degrees: (1 - sqrt(1/2)) / 2.
    before, after = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 1], [0, 1]])
    assert float(importance.block_influence(before, after)) == pytest.approx(0.146447, abs=1e-6)
    assert float(importance.block_influence(before, 3 * before)) == pytest.approx(0, abs=1e-12)


def test_relative_has_mean_one_and_leaves_zeros() -> None:
    assert importance.relative(torch.tensor([1.0, 2, 3])).tolist() == [0.5, 1, 1.5]
    assert importance.relative(torch.zeros(3)).tolist() == [0, 0, 0]


def test_by_norm_by_hand() -> None:
    # Root mean square of (3, 4, 0, 0) is 2.5; twice as many equal units are worth as much each.
    torch.testing.assert_close(importance.by_norm(torch.tensor([3.0, 4, 0, 0])), torch.tensor([1.2, 1.6, 0, 0]))
    assert importance.by_norm(torch.full((4,), 7.0)).tolist() == importance.by_norm(torch.full((8,), 7.0))[:4].tolist()
    assert importance.by_norm(torch.zeros(3)).tolist() == [0, 0, 0]


def test_head_relevance_by_hand() -> None:
    """One sample, two heads, two tokens: negative products count as nothing, and heads are not averaged."""
    weights = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]])
    gradients = torch.tensor([[[[2.0, -2.0], [4.0, 4.0]], [[3.0, 9.0], [-1.0, -1.0]]]])
    # Head 0: (1 + 0 + 1 + 3) / 4; head 1: (3 + 0 + 0 + 0) / 4.
    assert importance.head_relevance(weights, gradients).tolist() == [1.25, 0.75]
    twice = importance.head_relevance(torch.cat([weights, weights]), torch.cat([gradients, 0 * gradients]))
    assert twice.tolist() == [0.625, 0.375]
