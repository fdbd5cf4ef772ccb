"""Batches that run in step compute what each does alone, read each layer once, and hold no more than one."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress.surgery.deferred import defer, empty
from mmcompress.surgery.lending import run_in_step


class Model(nn.Module):
    """Two Linears, of which every second call skips the first; a weight that is read without a call; notes on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.noted: Tensor | None = None

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        assert self.first.weight.shape == (3, 3)
        assert self.first.weight.dtype == torch.float32
        self.noted = x
        x = x if skip else self.first(x)
        x = self.second(x) @ self.second.weight.T[:2, :].T @ self.second.weight.T[:2, :]
        return x * self.scale + self.noted.sum()


def deferred() -> tuple[Model, Model, list[str], list[str]]:
    """A model, the same deferred, the reads so far, and whichever other layer was still held at one of them."""
    torch.manual_seed(0)
    whole, hollow = Model(), Model()
    state = {name: value.detach().clone() for name, value in whole.state_dict().items()}
    empty(hollow)
    reads, held = list[str](), list[str]()
    alive: dict[str, weakref.ref[Tensor]] = {}

    def reading(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            layer = name.rpartition(".")[0]
            held.extend(other for other, ref in alive.items() if ref() is not None and not other.startswith(layer))
            reads.append(name)
            made = state[name].to(torch.bfloat16).float().clone()
            alive[name] = weakref.ref(made)
            return made

        return read

    for name, tensor in hollow.state_dict(keep_vars=True).items():
        defer(tensor, reading(name))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return whole, hollow, reads, held


def batches(count: int = 5) -> list[Tensor]:
    return list(torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(1)))


def run(model: nn.Module, calls: list[Any], **more: Any) -> list[Tensor]:
    told: dict[str, Any] = {"goes_on": lambda index: None, "reached": lambda tensor: None, **more}
    return list(run_in_step(model, calls, **told))


def test_each_batch_computes_what_it_does_alone_and_each_layer_is_read_once() -> None:
    whole, hollow, reads, held = deferred()
    calls: list[Any] = [lambda model, x=x, skip=i % 2 == 1: model(x, skip) for i, x in enumerate(batches())]
    want = [call(whole) for call in calls]
    for got, wanted in zip(run(hollow, calls), want, strict=True):
        assert torch.equal(got, wanted)
        assert not got.requires_grad
    assert reads == ["first.weight", "first.bias", "second.weight", "second.bias", "scale"]
    assert held == []
    assert hollow.noted is None


def test_a_layer_is_reached_when_all_have_come_to_it() -> None:
    _, hollow, _, _ = deferred()
    came: list[int] = []
    now = 0

    def goes_on(index: int) -> None:
        nonlocal now
        now = index

    def reached(tensor: Tensor) -> None:
        if tensor is hollow.second.weight:
            assert came == [1, 3, 0, 2, 4]  # the second and the fourth need not wait for the first layer
            came.append(-1)

    handle = hollow.second.register_forward_pre_hook(lambda module, args: came.append(now))
    calls = [lambda model, x=x, skip=i % 2 == 1: model(x, skip) for i, x in enumerate(batches())]
    run(hollow, calls, goes_on=goes_on, reached=reached)
    handle.remove()
    assert came[5:] == [-1]


def test_results_come_in_order_and_none_is_held_longer_than_it_is_looked_at() -> None:
    _, hollow, _, _ = deferred()
    seen: list[weakref.ref[Tensor]] = []
    for rows in run_in_step(hollow, [lambda model, x=x: model(x) for x in batches()], lambda i: None, lambda t: None):
        assert [ref for ref in seen if ref() is not None] in ([], seen[-1:])
        seen.append(weakref.ref(rows))
    assert len(seen) == 5


def test_what_a_batch_raises_comes_out_and_no_thread_is_left() -> None:
    _, hollow, _, _ = deferred()
    before = threading.active_count()

    def fails(model: Any) -> Tensor:
        model.first(torch.ones(1, 3))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(hollow, [lambda model: model(torch.ones(1, 3)), fails, lambda model: model(torch.ones(1, 3))])
    assert threading.active_count() == before


def test_nobody_waits_for_results_that_are_not_taken() -> None:
    _, hollow, reads, _ = deferred()
    before = threading.active_count()
    calls: list[Any] = [lambda model: model.first(torch.ones(1, 3)), lambda model: model(torch.ones(1, 3))]
    made = run_in_step(hollow, calls, lambda index: None, lambda tensor: None)
    next(made)
    made.close()
    assert reads == ["first.weight", "first.bias"]
    assert threading.active_count() == before
