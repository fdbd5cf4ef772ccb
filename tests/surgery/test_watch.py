import gc
import weakref
from typing import Literal

import pytest
import torch
from torch import nn

from mmcompress.surgery.watch import (
    Sums,
    evaluating,
    meter,
    padding_mask,
    watch_blocks,
    watch_gradients,
    watch_inputs,
)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_inputs_are_seen_and_masked_and_hooks_go_away() -> None:
    model, seen = _model().eval(), []
    inputs = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]])
    with watch_inputs({"first": model[0]}, lambda name, tokens: seen.append((name, tokens))) as watch:
        model(inputs)
        watch.mask = mask
        model(inputs)
    model(inputs)
    assert [name for name, _ in seen] == ["first", "first"]
    assert torch.equal(seen[0][1], inputs.flatten(0, 1))
    assert torch.equal(seen[1][1], inputs[mask.bool()])


def test_the_mask_says_nothing_about_inputs_of_other_tokens() -> None:
    model, seen = _model().eval(), {}
    inputs, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]])
    modules = {"masked": model[0], "other": model[2]}
    with watch_inputs(modules, lambda name, tokens: seen.update({name: tokens}), unmasked=("other",)) as watch:
        watch.mask = mask
        hidden = model[0](inputs)
        model[2](hidden)
    assert torch.equal(seen["masked"], inputs[mask.bool()])
    assert torch.equal(seen["other"], hidden.flatten(0, 1))


def test_a_meter_counts_what_happens_inside_calls_of_its_modules() -> None:
    model, done = _model().eval(), [0]

    class Work(nn.Module):
        def __init__(self, amount: int) -> None:
            super().__init__()
            self.amount = amount

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            done[0] += self.amount
            return states

    parts = nn.Sequential(Work(1), nn.Sequential(Work(10), Work(100)), Work(1000))
    with meter([parts[1], parts[2]], lambda: done[0]) as spent:
        parts(torch.zeros(1))
        assert spent() == 1110
        parts(torch.zeros(1))
    assert (spent(), done) == (2220, [2222])
    assert not parts[1]._forward_hooks
    assert not parts[1]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="shapes"), meter([model[0]], lambda: 0):
        model(torch.zeros(1, 99))
    assert not model[0]._forward_hooks


def test_hooks_go_away_after_an_error() -> None:
    model = _model()
    with pytest.raises(RuntimeError, match="shapes"), watch_inputs({"0": model[0]}, lambda *_: None):
        model(torch.zeros(1, 99))
    with pytest.raises(ValueError, match="mine"), watch_gradients({"0": model[0]}, lambda *_: None, "updates"):
        raise ValueError("mine")
    assert not model[0]._forward_pre_hooks
    assert not model[0]._forward_hooks


def test_blocks_are_seen_from_both_sides() -> None:
    model, seen = _model().eval(), []
    inputs = torch.randn(1, 5, 3)
    with watch_blocks({"b": model[0]}, lambda name, before, after: seen.append((before, after))):
        model(inputs)
    assert torch.equal(seen[0][0], inputs[0])
    assert torch.equal(seen[0][1], model[0](inputs)[0])


def test_gradients_equal_autograd_although_parameters_are_frozen() -> None:
    model, inputs, seen = _model(), torch.randn(2, 5, 3), {}

    def record(name: str, states: torch.Tensor, gradient: torch.Tensor) -> None:
        seen[name] = (states, gradient)

    with evaluating(model), watch_gradients({"2": model[2]}, record):
        model(inputs).tanh().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    hidden = model.eval()[0](inputs).detach().requires_grad_()
    model[2](hidden).tanh().sum().backward()
    torch.testing.assert_close(seen["2"][0], hidden.detach())
    torch.testing.assert_close(seen["2"][1], hidden.grad)


def test_outputs_of_a_module_against_autograd() -> None:
    model, inputs, seen = _model().eval(), torch.randn(2, 5, 3), []
    with watch_gradients({"0": model[0]}, lambda name, states, gradient: seen.append((states, gradient)), "outputs"):
        model(inputs).tanh().sum().backward()
    hidden = model[0](inputs).detach().requires_grad_()
    model[2](hidden).tanh().sum().backward()
    torch.testing.assert_close(seen[0][0], inputs)
    torch.testing.assert_close(seen[0][1], hidden.grad)


def test_updates_are_what_a_block_added() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + hidden_states.square()

    block, inputs, seen = Block(), torch.randn(1, 2, 3), []
    with watch_gradients({"b": block}, lambda name, added, gradient: seen.append((added, gradient)), "updates"):
        (3 * block(hidden_states=inputs)).sum().backward()
    torch.testing.assert_close(seen[0][0], inputs.square())
    torch.testing.assert_close(seen[0][1], torch.full_like(inputs, 3))


@pytest.mark.parametrize("of", ["inputs", "outputs", "updates"])
def test_nothing_outlives_its_batch(of: Literal["inputs", "outputs", "updates"]) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    class Block(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            alive.append(weakref.ref(states))
            made = states * states
            alive.append(weakref.ref(made))
            return made

    block = Block()
    gc.disable()
    try:
        with watch_gradients({"b": block}, lambda *_: None, of):
            block(torch.randn(1, 2, 3)).sum().backward()
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_evaluating_puts_every_flag_back() -> None:
    model = _model()
    model[0].eval()
    model[2].weight.requires_grad_(False)

    def run() -> None:
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run()
    assert [m.training for m in (model, *model)] == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]


def test_sums_stream_to_the_same_moments() -> None:
    states = torch.randn(50, 4, dtype=torch.float64) + 3
    whole, parts, diagonal = Sums(full=True), Sums(full=True), Sums(full=False)
    whole.add(states)
    diagonal.add(states)
    for part in states.split(7):
        parts.add(part)
    torch.testing.assert_close(parts.mean(), states.mean(0))
    torch.testing.assert_close(parts.second_moment(), whole.second_moment())
    torch.testing.assert_close(diagonal.norms(centred=False), states.square().mean(0).sqrt())
    torch.testing.assert_close(diagonal.norms(centred=True), states.std(0, correction=0))
    torch.testing.assert_close(parts.norms(centred=True), states.std(0, correction=0))


def test_weighted_sums_count_a_token_as_often_as_its_weight_says() -> None:
    states = torch.randn(6, 4, dtype=torch.float64)
    weighted, repeated = Sums(full=True), Sums(full=True)
    weighted.add(states, torch.tensor([1.0, 2, 0, 3, 1, 1]))
    repeated.add(states.repeat_interleave(torch.tensor([1, 2, 0, 3, 1, 1]), 0))
    torch.testing.assert_close(weighted.mean(), repeated.mean())
    torch.testing.assert_close(weighted.second_moment(), repeated.second_moment())
    # Kish: (1 + 2 + 3 + 1 + 1)^2 / (1 + 4 + 9 + 1 + 1)
    assert weighted.count == 4
    assert repeated.count == 8
    assert Sums(full=True).count == 0


def test_padding_mask() -> None:
    mask = torch.ones(2, 5)
    assert padding_mask({"input_ids": mask, "attention_mask": mask}) is mask
    assert padding_mask({"pixel_values": mask, "pixel_attention_mask": mask}) is mask
    assert padding_mask({"pixel_values": mask}) is None
    heard = torch.ones(2, 9)
    assert padding_mask({"attention_mask": heard, "decoder_input_ids": mask, "decoder_mask": mask}) is mask
