"""Compensation on tiny families: what the repaired readers say about calibration tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.passes import prune_effects, prune_repair
from mmcompress.passes.base import Context
from mmcompress.passes.prune_repair import repaired_readers
from mmcompress.passes.prune_scores import tower_batches
from mmcompress.passes.prune_units import Group, count_tokens, list_groups
from mmcompress.surgery.linears import spread
from mmcompress.surgery.watch import Sums, evaluating, watch_inputs
from tests import tiny
from tests.passes.test_prune_scores import context


def halved(bundle: Bundle) -> dict[Group, list[int]]:
    tokens = {path: n for tower in bundle.towers() for path, n in count_tokens(bundle, tower).items()}
    groups = list_groups(bundle, bundle.towers(), ("heads", "neurons"), (), tokens)
    return {group: list(range(0, group.units, 2)) for group in groups}


def readings(bundle: Bundle, tower: str, data: Context, readers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All calibration tokens each reader sees, (B, N, C): one batch."""
    seen: dict[str, Tensor] = {}
    with evaluating(bundle.model), torch.inference_mode(), watch_inputs(readers, seen.__setitem__):
        (inputs,) = tower_batches(bundle, tower, data, "test")
        bundle.encode(tower, inputs)
    size = len(next(iter(inputs.values())))
    return {path: states.unflatten(0, (size, -1)) for path, states in seen.items()}


def sensitivities(bundle: Bundle, tower: str, data: Context, readers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The weights (B, N) of the same tokens, by plain autograd through each reader's output."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str, output: Tensor) -> Tensor:
        outputs[path] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[path]

    handles = [
        reader.register_forward_hook(lambda module, args, output, path=path: keep(path, output))
        for path, reader in readers.items()
    ]
    with evaluating(bundle.model):
        ((inputs, differentiate),) = prune_effects._directions(bundle, tower, data, "repair")
        gradients = torch.autograd.grad(differentiate(bundle.encode(tower, inputs), 0), list(outputs.values()))
    for handle in handles:
        handle.remove()
    return {path: gradient.square().sum(-1) for path, gradient in zip(outputs, gradients, strict=True)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_compensation_never_makes_a_layer_worse_on_calibration_tokens(family: str) -> None:
    """Each token's error counted by how much it moves the embedding."""
    bundle, data = tiny.bundle(family), context(8, batch_size=8)
    kept = halved(bundle)
    made = {method: repaired_readers(bundle, kept, data, method, 0.01) for method in ("bias", "least-squares")}
    for tower in bundle.towers():
        mine = {group.reader: group for group in kept if group.tower == tower.name}
        readers = {path: bundle.module(path) for path in mine}
        seen = readings(bundle, tower.name, data, readers)
        weights = sensitivities(bundle, tower.name, data, readers)
        for path, group in mine.items():
            reader = readers[path]
            columns = spread(torch.tensor(kept[group]), group.width)
            candidates = [(reader.weight[:, columns], reader.bias)]
            candidates += [(made[method][f"{path}.weight"], made[method][f"{path}.bias"]) for method in made]
            with torch.no_grad():
                wanted = reader(seen[path])
                errors = [
                    float(
                        (
                            (nn.functional.linear(seen[path][..., columns], *c) - wanted).square().sum(-1)
                            * weights[path]
                        ).mean()
                    )
                    for c in candidates
                ]
            none, folded, refitted = errors
            # Equal where a few tokens are all that counts: shrinkage then leaves the bias alone.
            assert refitted <= folded < none


def test_padding_and_unread_tokens_weigh_nothing() -> None:
    """CLIP's last vision block is read at the class token alone, and its text is causal and read at the end of text."""
    bundle, data = tiny.bundle("clip"), context(8, batch_size=8)
    last = bundle.tower("vision").blocks[-1].mlp.reader
    weights = sensitivities(bundle, "vision", data, {last: bundle.module(last)})[last]
    assert (weights[:, 0] > 0).all()
    assert (weights[:, 1:] == 0).all()
    sums = {last: Sums(full=False)}
    prune_effects.stream_by_effect(bundle, sums, data, "repair")
    seen = readings(bundle, "vision", data, {last: bundle.module(last)})[last][:, 0]
    torch.testing.assert_close(sums[last].mean(), (seen * weights[:, :1]).sum(0) / weights[:, 0].sum())
    assert 1 <= sums[last].count <= 8


def test_the_memory_limit_splits_the_work_but_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, data = tiny.bundle("clip"), context()
    kept = halved(bundle)
    assert len(prune_repair.parts(bundle, list(kept), True)) == 1
    monkeypatch.setattr(prune_repair, "MOMENTS_BYTES", 0)
    parts = prune_repair.parts(bundle, list(kept), True)
    assert len(parts) > 1
    size = sum(p.numel() * 4 for p in bundle.model.parameters())
    assert all(len(part) == 1 or sum(4 * (g.units * g.width) ** 2 for g in part) <= size // 6 for part in parts)
    assert [group for part in parts for group in part] == list(kept)
    split = repaired_readers(bundle, kept, data, "least-squares", 0.01)
    monkeypatch.setattr(prune_repair, "parts", lambda _, groups, __: [groups])
    whole = repaired_readers(bundle, kept, data, "least-squares", 0.01)
    assert all(torch.equal(split[name], whole[name]) for name in whole)
