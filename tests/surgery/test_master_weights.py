"""Weights that train although they are integers: what they are rounded to, where gradients stop, where they begin and end."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmcompress.ops.grouped import Grouped, nearest
from mmcompress.ops.half_quadratic import half_quadratic
from mmcompress.ops.rounding import INT8, WEIGHT_INT7, WEIGHT_INT8, Levels
from mmcompress.surgery import quantized_base
from mmcompress.surgery.float8 import Float8Linear
from mmcompress.surgery.master_weights import Masters, begun, holders
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedEmbedding, QuantizedLinear, TiedLinear, quantized
from mmcompress.surgery.quantized_base import Quantized

# Sixteen numbers on a grid of steps of 0.5 from -1.5 to 6: what they are rounded to, and whether their gradient passes.
FOUR_BITS = [
    (-2.0, -1.5, 0), (-1.76, -1.5, 0), (-1.75, -1.5, 0), (-1.74, -1.5, 1), (-1.5, -1.5, 1), (-0.3, -0.5, 1), (0.0, 0.0, 1),
    (0.24, 0.0, 1), (0.25, 0.0, 1), (0.26, 0.5, 1), (0.75, 1.0, 1), (3.1, 3.0, 1), (6.0, 6.0, 1), (6.2, 6.0, 1),
    (6.3, 6.0, 0), (9.0, 6.0, 0),
]  # fmt: skip


def four_bits() -> PackedLinear:
    """One row of sixteen weights, all 0."""
    layer = PackedLinear(nn.Linear(16, 1, bias=False), 16)
    zeros = torch.full((1, 16), 3, dtype=torch.uint8)
    layer.set_rows(slice(0, 1), Grouped(zeros, torch.tensor([[0.5]]), zeros[:, :1]))
    return layer


def hold(layer: Quantized, values: Tensor) -> nn.Parameter:
    layer.register_parameter("master_weight", nn.Parameter(values))
    master = layer.master
    assert master is not None
    return master


def test_four_bits_by_hand() -> None:
    layer = four_bits()
    values, rounded, passes = torch.tensor(FOUR_BITS).t()
    master = hold(layer, values[None].clone())
    assert layer.weight[0].tolist() == rounded.tolist()
    states = torch.arange(1.0, 17.0)[None]
    (made := layer(states)).sum().backward()
    assert made.item() == pytest.approx(float((states[0] * rounded).sum()))
    assert master.grad is not None
    assert master.grad[0].tolist() == (states[0] * passes).tolist()
    layer.store_rows(master, slice(0, 1))
    del layer.master_weight
    assert layer.weight[0].tolist() == rounded.tolist()
    assert layer.grouped().codes[0].tolist() == [round(2 * value) + 3 for value in rounded.tolist()]


@pytest.mark.parametrize(("levels", "high"), [(WEIGHT_INT8, 127), (WEIGHT_INT7, 63)])
def test_eight_bits_by_hand(levels: Levels, high: int) -> None:
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0, float(high)], [0.0, 0.5 * high, 1.0]])  # scales of 1 and 0.5
    layer = QuantizedLinear(linear, None, levels)
    assert layer.weight_scale.tolist() == [1.0, 0.5]
    master = hold(layer, torch.tensor([[1.4, -2.6, high + 0.6], [-0.8, 0.5 * high + 0.2, -0.5 * high - 0.3]]))
    assert layer.weight.tolist() == [[1.0, -3.0, high], [-1.0, 0.5 * high, -0.5 * high]]
    layer(torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert master.grad is not None
    assert master.grad.tolist() == [[1.0, 10.0, 0.0], [1.0, 10.0, 0.0]]
    layer.store_rows(master, slice(0, 2))
    assert layer.weight_int8.tolist() == [[1, -3, high], [-2, high, -high]]
    assert layer.weight_int8.dtype == torch.int8


def test_eight_bit_floats_by_hand() -> None:
    linear = nn.Linear(3, 1, bias=False)
    linear.weight.data = torch.tensor([[896.0, 1.0, 2.0]])  # a scale of 2
    layer = Float8Linear(linear, static=True)
    master = hold(layer, torch.tensor([[900.0, 2.1, -0.4]]))
    # Between 1 and 2 E4M3 has steps of 1/8: 2.1 / 2 = 1.05 goes to 1; -0.2 to -13/64, of steps of 1/64 between 1/8 and 1/4.
    assert layer.weight.tolist() == [[896.0, 2.0, -26 / 64]]
    layer.weight.sum().backward()
    assert master.grad is not None
    assert master.grad.tolist() == [[0.0, 1.0, 1.0]]
    layer.store_rows(master, slice(0, 1))
    assert layer.weight_float8.float().tolist() == [[448.0, 1.0, -13 / 64]]


def test_only_the_rows_looked_up_have_gradients() -> None:
    table = nn.Embedding(4, 2, padding_idx=0)
    table.weight.data = torch.tensor([[127.0, 1.0], [12.7, 3.0], [1.27, 0.5], [127.0, 7.0]])
    layer = quantized(table, None)
    assert isinstance(layer, QuantizedEmbedding)
    ids = torch.tensor([[1, 0], [3, 1]])
    before = layer(ids)
    master = hold(layer, layer.weight + 0.02)
    assert torch.equal(layer(ids), before)
    layer(ids).sum().backward()
    assert master.grad is not None
    # Scales are 1, 0.1, 0.01 and 1, so 12.7 + 0.02 is inside. The padding's row stays as it is.
    assert master.grad.tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]


def test_a_filter_has_the_scale_of_its_channel() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 2)
    layer = quantized(conv, None)
    states, wanted = torch.randn(2, 3, 5, 5), layer.weight
    master = hold(layer, begun(layer, conv.weight)[0])
    assert torch.equal(master, conv.weight)
    assert torch.equal(layer.weight, wanted)
    layer(states).sum().backward()
    want = nn.functional.unfold(states, 2).sum((0, 2)).view(1, 3, 2, 2).expand(4, -1, -1, -1)
    torch.testing.assert_close(master.grad, want)


def test_a_tied_layer_trains_the_table() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(5, 4)
    rows = quantized(table, None)
    linear = nn.Linear(4, 5, bias=False)
    tied = quantized(linear, None, table=rows)
    assert isinstance(tied, TiedLinear)
    assert list(holders(nn.ModuleDict({"rows": rows, "tied": tied}))) == ["rows"]
    master = hold(rows, table.weight.detach().clone())
    states = torch.randn(3, 4)
    tied(states).sum().backward()
    torch.testing.assert_close(master.grad, states.sum(0).expand(5, -1))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 6)


GAIN = torch.linspace(0.5, 2, 32)
LAYERS: list[Callable[[nn.Linear], Quantized]] = [
    lambda layer: PackedLinear(layer, 16, nearest),
    lambda layer: PackedLinear(layer, 32, nearest, gain=GAIN),
    lambda layer: QuantizedLinear(layer, None),
    lambda layer: QuantizedLinear(layer, INT8, gain=GAIN),
    lambda layer: Float8Linear(layer, static=False),
]


@pytest.mark.parametrize("make", LAYERS)
def test_masters_begin_as_the_original(make: Callable[[nn.Linear], Quantized]) -> None:
    original = linear()
    layer = make(original)
    values, given = begun(layer, original.weight)
    gain = getattr(layer, "input_gain", None)
    assert torch.equal(values, original.weight / gain if gain is not None else original.weight)
    assert given == 6 * 32


def test_masters_begin_as_what_is_stored_where_another_integer_is_the_nearest() -> None:
    layer, (values, wanted, passes) = four_bits(), torch.tensor(FOUR_BITS).t()
    made, given = begun(layer, values[None])
    # All integers stand for 0, and only these three numbers go there.
    kept = torch.tensor([value in (0.0, 0.24, 0.25) for value, _, _ in FOUR_BITS])
    assert torch.equal(made[0], torch.where(kept, values, 0.0))
    assert given == 3
    # What is cut off would have no gradient: -2 goes to -1.5, and begins there.
    layer.store_rows(values[None], slice(0, 1))
    made, given = begun(layer, values[None])
    assert torch.equal(made[0], torch.where(passes > 0, values, wanted))
    assert given == passes.sum()


def bits(value: Tensor) -> Tensor:
    return value.detach().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("known", ["original", "another", "half", "none"])
@pytest.mark.parametrize("make", [*LAYERS, lambda layer: PackedLinear(layer, 16, half_quadratic)])
def test_without_a_step_no_bit_changes(make: Callable[[nn.Linear], Quantized], known: str, dtype: torch.dtype) -> None:
    original = linear()
    layer = make(linear()).to(dtype).float()
    before = copy.deepcopy(layer.state_dict())
    states = torch.randn(4, 32)
    wanted = layer(states)
    if known == "another":
        original.weight.data = torch.randn(6, 32) * 0.1
    if known == "half":
        original.weight.data = original.weight.data.to(dtype)
    root, other = nn.ModuleDict({"one": layer}), nn.ModuleDict({} if known == "none" else {"one": original})
    masters = Masters.of(holders(root), other)
    with masters.training():
        assert torch.equal(layer(states), wanted)
        assert layer.master is not None
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(bits(value), bits(before[name])) for name, value in after.items())
    assert masters.changed == 0
    assert masters.given > 0 if known in ("original", "half") else known == "another" or masters.given == 0
    assert masters.count == 6 * 32


def test_integers_become_what_masters_have_become_and_changes_are_counted() -> None:
    layer = four_bits()
    masters = Masters.of({"one": layer}, nn.Module())
    with masters.training(), torch.no_grad():
        assert layer.master is not None
        layer.master.copy_(torch.tensor([FOUR_BITS])[..., 0])
    rounded = [want for _, want, _ in FOUR_BITS]
    assert layer.weight[0].tolist() == rounded
    assert masters.changed == sum(want != 0 for want in rounded)
    assert layer.master is None


def test_an_error_leaves_the_integers_as_they_were() -> None:
    layer = four_bits()
    before = copy.deepcopy(layer.state_dict())
    masters = Masters.of({"one": layer}, nn.Module())

    def interrupted() -> None:
        with masters.training(), torch.no_grad():
            assert layer.master is not None
            layer.master.add_(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(layer.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("make", LAYERS)
def test_large_layers_go_some_rows_at_a_time(
    make: Callable[[nn.Linear], Quantized], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, states = linear(), torch.randn(3, 32)

    def trained() -> tuple[Tensor, Tensor, int, Quantized]:
        layer = make(original)
        masters = Masters.of({"one": layer}, nn.ModuleDict({"one": original}))
        with masters.training():
            assert layer.master is not None
            made = layer(states)
            made.square().sum().backward()
            assert layer.master.grad is not None
            gradient = layer.master.grad.clone()
            with torch.no_grad():
                layer.master.add_(0.05)
        return made, gradient, masters.changed, layer

    whole = trained()
    monkeypatch.setattr(quantized_base, "AT_ONCE", 4 * 32)
    parts = trained()
    torch.testing.assert_close(parts[:2], whole[:2])
    assert parts[2] == whole[2] > 0
    assert torch.equal(parts[3].weight, whole[3].weight)
