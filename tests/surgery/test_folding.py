"""Gains folded into norms: the same function, and only where it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mmcompress.surgery.folding import can_fold, fold, may_fold, watch_readers


class Scaled(nn.Module):
    """A norm by root mean square that multiplies by `extra` + weight."""

    def __init__(self, width: int, extra: float) -> None:
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.full((width,), 1 - extra)), extra

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype) * (self.extra + self.weight)


def test_a_layer_norm_and_a_root_mean_square_take_a_gain() -> None:
    gain = torch.tensor([0.5, 2, 1, 3, 1, 1, 1, 4])
    torch.manual_seed(0)
    for norm in (nn.LayerNorm(8), Scaled(8, 0.0), nn.RMSNorm(8)):
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(3, 8)
        want = norm(x) * gain
        assert may_fold(norm)
        assert can_fold(norm)
        fold(norm, gain)
        torch.testing.assert_close(norm(x), want)


def test_a_norm_that_multiplies_by_one_more_than_its_weight_takes_none() -> None:
    norm = Scaled(8, 1.0)
    before = copy.deepcopy(norm.state_dict())
    assert may_fold(norm)
    assert not can_fold(norm)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8)), nn.Identity()],
)
def test_what_has_not_the_parameters_of_a_norm_is_none(module: nn.Module) -> None:
    assert not may_fold(module)


class Reading(nn.Module):
    """A norm, two Linears that read it, and what else may."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4), other

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        rows, _, width = seen.shape
        made = self.one(seen).reshape(rows, -1, width) + self.two(seen).repeat(1, 1, 2)
        if self.other == "residual":
            return seen + made
        if self.other == "keyword":
            return made + torch.mul(input=seen, other=seen)
        if self.other == "list":
            return made + torch.cat([x, seen], dim=-1)[..., :8]
        if self.other == "copy":
            return made + self.one(seen.flip(0))
        if self.other == "weight":
            return made + nn.functional.linear(x[0], seen[0], None).mean()
        return made


def test_linears_that_read_a_norm_alone_are_found() -> None:
    model = Reading("")
    linears: dict[str, nn.Module] = {"one": model.one, "two": model.two}
    with watch_readers({"norm": model.norm}, linears) as readers:
        model(torch.randn(2, 3, 8))
        model(torch.randn(2, 5, 8))
    assert readers.alone() == {"norm": {"one", "two"}}
    assert not model.norm._forward_hooks


@pytest.mark.parametrize("other", ["residual", "keyword", "list", "copy", "weight"])
def test_a_norm_that_something_else_reads_is_none(other: str) -> None:
    model = Reading(other)
    with watch_readers({"norm": model.norm}, {"one": model.one, "two": model.two}) as readers:
        model(torch.randn(2, 3, 8))
    assert readers.found == {"norm": {"one", "two"}}
    assert readers.alone() == {}


def test_a_linear_that_is_not_among_those_asked_for_is_something_else() -> None:
    model = Reading("")
    with watch_readers({"norm": model.norm}, {"one": model.one}) as readers:
        model(torch.randn(2, 3, 8))
    assert readers.alone() == {}
