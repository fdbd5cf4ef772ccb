"""Zeros that stay while the rest trains."""

from __future__ import annotations

import torch
from torch import nn

from mmcompress.surgery.kept_zeros import zeros_kept, zeros_of
from mmcompress.surgery.low_rank_updates import low_rank_updates


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(4, 8))
    with torch.no_grad():
        made[0].weight[:, ::2] = 0
        made[1].bias.zero_()
        made[2].weight[0].zero_()
    return made


def step(net: nn.Sequential, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(3):
        (net[1](net[0](torch.randn(5, 8))).square() * torch.arange(1, 9)).sum().add(net[2].weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_zeros_of_linears_alone_stay() -> None:
    net = model()
    parameters = dict(net.named_parameters())
    before = net[0].weight.detach().clone()
    with zeros_kept(net, parameters) as count:
        step(net, list(parameters.values()))
    assert count == 32
    assert torch.equal(net[0].weight == 0, before == 0)
    assert (net[0].weight != before)[:, 1::2].all()
    assert net[1].bias.all()
    assert net[2].weight[0].all()
    step(net, list(parameters.values()))  # no hook is left
    assert net[0].weight.all()


def test_updates_of_low_rank_keep_zeros_where_they_are_asked_to() -> None:
    for keep in (True, False):
        net = model()
        with low_rank_updates(net, ["0"], 2, seed=0, keep_zeros=keep) as updates:
            step(net, list(updates.values()))
        assert bool((net[0].weight[:, ::2] == 0).all()) is keep
        assert net[0].weight[:, 1::2].all()


def test_layers_without_a_weight_of_a_product_have_none() -> None:
    assert zeros_of(nn.LayerNorm(4)) is None
    assert zeros_of(nn.Embedding(4, 4)) is None
