"""Costs by hand, and heads that share keys, which no tiny family has."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle, Processor
from mmcompress.manifest import Source
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_cut import cut_heads
from mmcompress.passes.prune_units import count_costs, count_tokens, list_groups, read_ranges, write_ranges
from mmcompress.views import Attention
from tests import tiny


def test_costs_by_hand() -> None:
    # clip, vision: C 48, 4 heads of 12, 96 neurons, 49 patches and a class token.
    bundle = tiny.bundle("clip")
    tower = bundle.tower("vision")
    tokens = count_tokens(bundle, tower)
    assert set(tokens.values()) == {50}
    heads, neurons = list_groups(bundle, [tower], ("heads", "neurons"), (1, -1), tokens)
    assert (heads.key, heads.units, heads.width, heads.kind) == ("vision.0", 4, 12, "heads")
    assert heads.cost.parameters == 3 * 12 * (48 + 1) + 12 * 48
    assert heads.cost.macs == 50 * 4 * 12 * 48 + 2 * 50 * 50 * 12
    assert (neurons.units, neurons.width) == (96, 1)
    assert neurons.cost.parameters == 48 + 1 + 48
    assert neurons.cost.macs == 50 * 2 * 48
    (block, *_) = list_groups(bundle, [tower], ("blocks",), (), tokens)
    assert block.cost.parameters == 4 * (48 * 48 + 48) + (2 * 96 * 48 + 96 + 48) + 2 * 2 * 48
    assert block.cost.macs == 4 * heads.cost.macs + 96 * neurons.cost.macs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_and_the_rest_make_the_tower(family: str) -> None:
    bundle = tiny.bundle(family)
    for tower in bundle.towers():
        blocks = list_groups(bundle, [tower], ("blocks",), (), count_tokens(bundle, tower))
        total = count_costs(bundle, tower)
        inside = sum(p.numel() for n, p in bundle.model.named_parameters() if n.startswith(tower.blocks_path + "."))
        assert sum(group.cost.parameters for group in blocks) == inside < total.parameters
        assert sum(group.cost.macs for group in blocks) < total.macs


@pytest.mark.parametrize("window", [56, 84])
def test_attention_in_windows_is_counted_as_it_runs(window: int) -> None:
    # 16 x 16 patches of 14 in windows of 4 x 4, or of 6 x 6 with what is left at two sides: 6 + 6 + 4.
    bundle = tiny.bundle("qwen2_5_vl")
    bundle.model.config.vision_config.window_size = bundle.model.model.visual.window_size = window  # type: ignore[union-attr]
    inside = bundle.tower("vision").blocks[0].attention
    assert inside.window == {56: 16, 84: (6**2 + 6**2 + 4**2) ** 2 / 16**2}[window]
    settings = Prune(ratio=0.05, units=("heads",), score="random", compensate="none", towers=("vision",))
    plan = settings.plan(bundle, Context())
    settings.apply(bundle, plan)
    assert settings.fit(bundle, Context())["recount"] == plan.decisions["after"]


def test_ranges() -> None:
    for indices in ([], [3], [0, 1, 2], [0, 2, 3, 9], [5, 6, 8, 10, 11, 12]):
        assert read_ranges(write_ranges(indices)) == indices
    assert write_ranges([0, 2, 3, 9]) == "0,2-3,9"


class SharedKeys(nn.Module):
    """6 query heads of width 4 over 3 key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12)
        self.out = nn.Linear(24, 8)
        self.heads = 6

    def forward(self, hidden: Tensor, silenced: int | None = None) -> Tensor:
        q, k, v = (f(hidden).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        if silenced is not None:
            mixed = mixed.clone()
            mixed[:, 2 * silenced : 2 * silenced + 2] = 0
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))


def test_heads_that_share_keys_go_together() -> None:
    torch.manual_seed(0)
    model = SharedKeys().double()
    cut = copy.deepcopy(model)
    view = Attention("", ("query", "key", "value"), "out", 6, 3, 4, (("", "heads", "heads"),))
    cut_heads(Bundle(cut, Processor(), cast(Any, None), Source("")), view, [0, 2])
    assert (cut.query.out_features, cut.key.out_features, cut.value.out_features, cut.out.in_features) == (16, 8, 8, 16)
    assert cut.heads == 4
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(cut(hidden), model(hidden, silenced=1), rtol=0, atol=1e-12)
