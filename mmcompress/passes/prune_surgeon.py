"""The score "obs" of `prune`: what a unit's reader cannot make up for when the unit goes and the others are refitted.

Statistics are those of the least-squares repair (`prune_repair`): weighted by how much each token moves the embedding, around the
mean where a bias can take it, with its shrinkage and ridge. So a score is the damage that this repair leaves, as the square of how
far the embedding moves, to first order and as if errors of tokens and output channels were independent: the currency of Taylor
scores, which take no repair for granted. Readers are looked at one by one: what is lost in one block is not seen in the next.

Memory: `prune_repair.parts`, and for one reader at a time its moments three times over in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.brain_surgeon import surgeon_scores
from mmcompress.ops.reconstruction import Moments, conditioned
from mmcompress.passes.base import Context
from mmcompress.passes.prune_effects import stream_by_effect
from mmcompress.passes.prune_repair import parts
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.watch import Sums


def surgeon(bundle: Bundle, groups: Sequence[Group], context: Context, ridge: float) -> list[Tensor]:
    """Return the growth of the reader's error at which each unit went (U,); 0 where nothing reaches the embedding."""
    scores: dict[str, Tensor] = {}
    for part in parts(bundle, groups, full=True):
        sums = {group.reader: Sums(full=True) for group in part}
        samples = stream_by_effect(bundle, sums, context, "optimal brain surgeon")
        for group in part:
            scores[group.reader] = _of_reader(bundle, group, sums.pop(group.reader), samples[group.tower], ridge)
        give_back_freed()
    return [scores[group.reader] for group in groups]


def _of_reader(bundle: Bundle, group: Group, seen: Sums, samples: int, ridge: float) -> Tensor:
    reader = bundle.module(group.reader)
    assert isinstance(reader, nn.Linear), f"{group.reader} was not checked to be a Linear"
    if not seen.weight:
        return torch.zeros(group.units)
    second = conditioned(
        Moments(seen.mean(), seen.second_moment(), seen.count), centred=reader.bias is not None, ridge=ridge
    )
    # A token's weight is its squared gradient summed up over the output's channels; errors do not know which of them they meet.
    damage = seen.weight / (samples * reader.out_features)
    return surgeon_scores(reader.weight.detach(), second, group.units) * damage
