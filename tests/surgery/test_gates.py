"""A gate of 1 changes nothing, one of 0 is a cut, and gradients say what opening a gate would do."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Plan
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_units import Group, write_ranges
from mmcompress.surgery.gates import Gates
from tests import tiny


def groups_of(bundle: Bundle) -> list[Group]:
    made = Prune(ratio=0.1, score="magnitude", compensate="none")
    found: list[Group] = made.survey(bundle, bundle.towers())[1]
    return found


def outputs(bundle: Bundle) -> dict[str, Tensor]:
    return {tower.name: bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)) for tower in bundle.towers()}


@torch.no_grad()
def test_open_gates_change_nothing_and_leave_nothing() -> None:
    bundle = tiny.bundle("whisper")
    before = outputs(bundle)
    gates = Gates(bundle.model, {group.reader: group.units for group in groups_of(bundle)})
    with gates.open():
        assert all(torch.equal(before[name], made) for name, made in outputs(bundle).items())
    assert not any(module._forward_pre_hooks for module in bundle.model.modules())


@torch.no_grad()
def test_closed_gates_are_a_cut() -> None:
    for family in ("clip", "whisper", "llava_clip"):
        bundle = tiny.bundle(family)
        before = outputs(bundle)
        groups = groups_of(bundle)
        gates = Gates(bundle.model, {group.reader: group.units for group in groups})
        kept: dict[str, dict[str, str]] = {"heads": {}, "neurons": {}, "blocks": {}}
        for number, group in enumerate(groups):
            stays = [unit for unit in range(group.units) if (unit + number) % 3] or [0]
            values = torch.zeros(group.units)
            values[stays] = 1
            gates.set(group.reader, values)
            kept[group.kind][group.key] = write_ranges(stays)
        with gates.open():
            masked = outputs(bundle)
        Prune().apply(bundle, Plan({"kept": kept}))
        for name, made in outputs(bundle).items():
            torch.testing.assert_close(made, masked[name], rtol=0, atol=1e-5)
            assert not torch.allclose(made, before[name], atol=1e-3)


@torch.no_grad()
def test_blocks_have_gates_too() -> None:
    for family in ("clip", "whisper", "llava_clip"):
        bundle = tiny.bundle(family)
        tower = bundle.towers()[-1]
        inputs = bundle.example_inputs(tower.name, 2)
        before = bundle.encode(tower.name, inputs)
        path = tower.blocks[-1].path
        gates = Gates(bundle.model, {}, [path])
        with gates.open():
            assert torch.equal(bundle.encode(tower.name, inputs), before)
            gates.set(path, torch.tensor([0.5]))
            half = bundle.encode(tower.name, inputs)
            gates.set(path, torch.tensor([0.0]))
            skipped = bundle.encode(tower.name, inputs)
        assert not any(module._forward_hooks for module in bundle.model.modules())
        kept = write_ranges([block.index for block in tower.blocks[:-1]])
        Prune().apply(bundle, Plan({"kept": {"heads": {}, "neurons": {}, "blocks": {tower.name: kept}}}))
        assert torch.equal(bundle.encode(tower.name, inputs), skipped)
        for one in (before, skipped):
            assert not torch.allclose(half, one, atol=1e-4)


def test_gradients_are_what_opening_a_gate_does() -> None:
    bundle = tiny.bundle("clip")
    bundle.model.double().requires_grad_(False)
    group = next(group for group in groups_of(bundle) if group.kind == "heads" and group.tower == "vision")
    gates = Gates(bundle.model, {group.reader: group.units})
    gates.values = {path: value.detach().double().requires_grad_() for path, value in gates.values.items()}
    pixels = {name: value.double() for name, value in bundle.example_inputs("vision", 2).items()}

    def loss() -> Tensor:
        return bundle.encode("vision", pixels).square().sum()

    with gates.open():
        loss().backward()
        first = gates.take_gradients()[group.reader]
        step, measured = 1e-6, []
        with torch.no_grad():
            for unit in range(group.units):
                moved = torch.ones(group.units, dtype=torch.float64)
                moved[unit] += step
                gates.set(group.reader, moved)
                above = loss()
                moved[unit] -= 2 * step
                gates.set(group.reader, moved)
                measured.append((above - loss()) / (2 * step))
        torch.testing.assert_close(first, torch.stack(measured), rtol=1e-5, atol=1e-7)
        assert first.abs().max() > 1e-3
        # They add up until they are taken.
        gates.set(group.reader, torch.ones(group.units))
        loss().backward()
        loss().backward()
        torch.testing.assert_close(gates.take_gradients()[group.reader], 2 * first)
    assert not any(value.any() for value in gates.take_gradients().values())
