"""The score "routing" of `prune`: how much of the tokens' routing weight an expert is given.

A token's weights sum to 1 over the experts it goes through. So an expert's mean weight over tokens is the share that it has in what
the feed-forward gives out, by the router's own measure, and the shares of a block sum to 1. To count how often it is chosen instead
would take one that comes in second with a weight near 0 for as good as one that decides. An expert that no token is sent to has 0:
without it the same is computed of these samples.

The idea is that of SEER-MoE (Muzio, Sun and He 2024, arXiv 2404.05089), which counts choices over a calibration set, hard or by the
router's softmax over all experts. Here the weights are those that the model multiplies with: the softmax over those chosen.

Shape alphabet: T tokens, E experts, K experts that a token goes through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from mmcompress.passes.prune_scores import by_tower, tower_batches
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.routing import watch_routing
from mmcompress.surgery.watch import evaluating, padding_mask


def routing(bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """Return the mean routing weight of each expert over calibration tokens, per group (E,). Raises UsageError without data."""
    sums = {group.reader: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    counts = dict.fromkeys(sums, 0)

    def record(path: str, weights: Tensor, indices: Tensor) -> None:
        sums[path].index_add_(0, indices.flatten().cpu(), weights.flatten().double().cpu())
        counts[path] += len(weights)

    for name, mine in by_tower(groups):
        routers = {group.reader: bundle.module(group.reader) for group in mine}
        with evaluating(bundle.model), torch.inference_mode(), watch_routing(routers, record) as watch:
            for inputs in tower_batches(bundle, name, context, "routing"):
                watch.mask = padding_mask(inputs)
                bundle.encode(name, inputs)
    return [(sums[group.reader] / counts[group.reader]).float() for group in groups]
