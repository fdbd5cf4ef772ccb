"""Compensation on tiny families: what the repaired readers say about calibration tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.passes import prune_repair
from mmcompress.passes.base import Context
from mmcompress.passes.prune_repair import repaired_readers
from mmcompress.passes.prune_scores import tower_batches
from mmcompress.passes.prune_units import Group, count_tokens, list_groups
from mmcompress.surgery.linears import spread
from mmcompress.surgery.watch import evaluating, padding_mask, watch_inputs
from tests import tiny
from tests.passes.test_prune_scores import context


def halved(bundle: Bundle) -> dict[Group, list[int]]:
    tokens = {path: n for tower in bundle.towers() for path, n in count_tokens(bundle, tower).items()}
    groups = list_groups(bundle, bundle.towers(), ("heads", "neurons"), (), tokens)
    return {group: list(range(0, group.units, 2)) for group in groups}


def readings(bundle: Bundle, tower: str, data: Context, readers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All calibration tokens each reader sees, (T, C)."""
    seen: dict[str, list[Tensor]] = {path: [] for path in readers}
    with (
        evaluating(bundle.model),
        torch.inference_mode(),
        watch_inputs(readers, lambda path, tokens: seen[path].append(tokens)) as watch,
    ):
        for inputs in tower_batches(bundle, tower, data, "test"):
            watch.mask = padding_mask(inputs)
            bundle.encode(tower, inputs)
    return {path: torch.cat(parts) for path, parts in seen.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_compensation_never_makes_a_layer_worse_on_calibration_tokens(family: str) -> None:
    bundle, data = tiny.bundle(family), context(8, batch_size=3)
    kept = halved(bundle)
    made = {method: repaired_readers(bundle, kept, data, method, 0.01) for method in ("bias", "least-squares")}
    for tower in bundle.towers():
        mine = [group for group in kept if group.tower == tower.name]
        seen = readings(bundle, tower.name, data, {group.reader: bundle.module(group.reader) for group in mine})
        for group in mine:
            reader = bundle.module(group.reader)
            columns = spread(torch.tensor(kept[group]), group.width)
            states = seen[group.reader]
            wanted = reader(states)
            errors = [
                float((nn.functional.linear(states[:, columns], weight, bias) - wanted).square().mean())
                for weight, bias in (
                    (reader.weight[:, columns], reader.bias),
                    *((made[m][f"{group.reader}.weight"], made[m][f"{group.reader}.bias"]) for m in made),
                )
            ]
            none, folded, refitted = errors
            assert refitted < folded < none


def test_the_memory_limit_splits_the_work_but_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, data = tiny.bundle("clip"), context()
    kept = halved(bundle)
    parts = prune_repair._parts(bundle, list(kept), True)
    assert len(parts) > 1
    size = sum(p.numel() * 4 for p in bundle.model.parameters())
    assert all(len(part) == 1 or sum(4 * (g.units * g.width) ** 2 for g in part) <= size // 4 for part in parts)
    assert [group for part in parts for group in part] == list(kept)
    split = repaired_readers(bundle, kept, data, "least-squares", 0.01)
    monkeypatch.setattr(prune_repair, "_parts", lambda _, groups, __: [groups])
    whole = repaired_readers(bundle, kept, data, "least-squares", 0.01)
    assert all(torch.equal(split[name], whole[name]) for name in whole)
