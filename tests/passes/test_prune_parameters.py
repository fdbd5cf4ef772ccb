"""What `prune` refuses, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmcompress.errors import UsageError
from mmcompress.passes import build, schema
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from tests import tiny


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": 1.5}, "prune.ratio is 1.5; expected 0 <= ratio < 1"),
        ({"ratio": -0.1}, "prune.ratio is -0.1"),
        ({"ratios": {"vision": 1.0}}, "prune.ratios.vision is 1.0"),
        ({"units": ["blocks", "heads"]}, "mixes blocks"),
        ({"units": ["head"]}, r"prune.units is \['head'\]"),
        ({"units": ["blocks"], "score": "magnitude"}, "magnitude does not rank blocks"),
        ({"score": "block-influence"}, "block-influence does not rank heads and neurons"),
        ({"multiple": 0}, "prune.multiple is 0"),
        ({"min_keep": 2}, "prune.min_keep is 2"),
        ({"target": 0}, "prune.target is 0"),
        ({"target": 1000, "ratios": {"vision": 0.5, "text": 0.1}}, "both target and ratios"),
        ({"ridge": "nan"}, "prune.ridge is 'nan'; expected float"),
        ({"target": float("inf")}, "prune.target is inf; expected float"),
        ({"multiple": float("inf")}, "prune.multiple is inf; expected int"),
        ({"uniform": True, "protect": [0]}, "contradict"),
        ({"score": "best"}, "prune.score is 'best'"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("prune", params)


def test_unknown_towers_and_missing_data() -> None:
    bundle = tiny.bundle("clip")
    with pytest.raises(UsageError, match="clip has no tower 'visoin'") as caught:
        Prune(towers=("visoin",)).check(bundle)
    assert caught.value.hint == "did you mean 'vision'?"
    with pytest.raises(UsageError, match=r"prune\.ratios names 'text'"):
        Prune(towers=("vision",), ratios={"text": 0.1}).check(bundle)
    with pytest.raises(UsageError, match="prune with optimal brain surgeon needs data"):
        Prune().plan(bundle, Context())
    with pytest.raises(UsageError, match="prune with compensate=least-squares needs data"):
        Prune(score="magnitude").plan(bundle, Context())


def test_a_protected_block_that_no_tower_has() -> None:
    bundle = tiny.bundle("clip")
    depths = [len(tower.blocks) for tower in bundle.towers()]
    assert depths == [3, 2]
    Prune(protect=(2,)).check(bundle)
    for index in (3, -4):
        with pytest.raises(UsageError, match=f"prune.protect names block {index}, and no tower has more than 3 blocks"):
            Prune(protect=(index,)).check(bundle)
    with pytest.raises(UsageError, match="no tower has more than 2 blocks"):
        Prune(protect=(2,), towers=("text",)).check(bundle)


def test_lists_and_pairs_may_have_spaces() -> None:
    made = build("prune", {"units": "heads, neurons", "ratios": "vision=0.5, text=0.1", "towers": ""})
    assert made == Prune(units=("heads", "neurons"), ratios={"vision": 0.5, "text": 0.1}, towers=())


def test_scores_that_are_not_numbers_choose_nothing() -> None:
    bundle = tiny.bundle("clip")
    path = bundle.tower("vision").blocks[1].mlp.reader
    with torch.no_grad():
        bundle.module(path).weight[:, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(UsageError, match="the magnitude score of neurons in vision block 1 is not finite"):
        Prune(score="magnitude", compensate="none").plan(bundle, Context())


def test_every_parameter_has_help() -> None:
    assert all(len(parameter.help) > 20 for parameter in schema("prune").parameters)
