"""A deferred tensor takes no memory, and what is cut from it is what would have been cut from its values."""

from __future__ import annotations

import torch
from torch import nn

from mmcompress.surgery.deferred import defer, empty, is_deferred, lend, take_back, values
from mmcompress.surgery.linears import keep_columns, keep_rows


def deferred_linear(weight: torch.Tensor) -> tuple[nn.Linear, list[str]]:
    """A Linear without bias whose weight will be `weight`, and the reads so far."""
    linear, reads = nn.Linear(weight.shape[1], weight.shape[0], bias=False), list[str]()
    empty(linear)

    def read() -> torch.Tensor:
        reads.append("weight")
        return weight

    defer(linear.weight, read)
    return linear, reads


def test_cuts_are_noted_and_made_when_values_are_asked_for() -> None:
    linear, reads = deferred_linear(torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.bfloat16))
    keep_rows(linear, torch.tensor([0, 2]))
    keep_columns(linear, torch.tensor([2, 0]))
    assert (linear.in_features, linear.out_features, tuple(linear.weight.shape)) == (2, 2, (2, 2))
    assert isinstance(linear.weight, nn.Parameter)
    assert linear.weight.untyped_storage().nbytes() == 4
    assert reads == []
    assert values(linear.weight).tolist() == [[3, 1], [9, 7]]
    assert values(linear.weight).dtype == torch.bfloat16
    assert reads == ["weight"] * 2


def test_a_model_of_hollow_tensors_runs_and_gives_zeros() -> None:
    linear, reads = deferred_linear(torch.ones(5, 4))
    assert linear(torch.ones(2, 4)).tolist() == [[0.0] * 5] * 2
    assert reads == []


def test_what_is_lent_has_values_and_the_layer_does_not() -> None:
    linear, _ = deferred_linear(torch.ones(5, 4))
    filled = lend(linear, lambda parameter: values(parameter).float())
    assert filled(torch.ones(4)).tolist() == [4.0] * 5
    assert is_deferred(linear.weight)
    assert not is_deferred(filled.get_parameter("weight"))


def test_what_is_handed_on_stays_shared() -> None:
    """The bias of a layer goes into its quantized counterpart as it is; BLIP shares one between two modules."""
    layer = nn.Linear(2, 3)
    empty(layer)
    defer(layer.bias, lambda: torch.ones(3))
    filled = lend(layer, values)
    other = nn.Linear(2, 3)
    other.bias = filled.bias  # type: ignore[assignment]
    take_back(other)
    empty(other)
    assert other.bias is layer.bias
    assert other.weight.untyped_storage().nbytes() == 4
