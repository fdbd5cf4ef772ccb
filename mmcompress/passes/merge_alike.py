"""How many tokens each block merges, from how alike they are in data: for `merge-tokens`' schedule "similar" and its `similarity`.

A block is given what those before it left, so how alike its tokens are depends on what they merge. The tower is therefore run
again, each time merging as was decided last, until nothing changes: then each number follows from tokens as that very schedule
leaves them. For a `similarity` one more block is settled by every run, so it ends; numbers solved for a share depend on one another
and may end up going to and fro by a token, which stops after ROUNDS and is recorded.

"similar" is worse where it was measured: on the DINOv2-S + MiniLM dual encoder with ToMe, R@1 image to text of 1,642 held-out
drawings is, against as many merges in every block, -1.0 points [-2.5, +0.4] at keep 0.75 and -12.3 [-14.6, -10.2] at keep 0.5. In
its fourth block 95 in 100 pairs have cosines above 0.98, in its fifth above 0.63, so most merges fall in the first and fourth;
such cosines say more of the block than of the tokens. Seen only once, in the model that merges nothing, the numbers are about the
same: -1.6 [-3.0, -0.1] and -10.1 [-12.4, -7.9]. Command: python -m bench.alike_table.

Shapes: S samples, K pairs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.ops.outliers import available
from mmcompress.ops.pairs import BEYOND, amounts_for_almost_all, mean_amounts
from mmcompress.ops.schedule import capped
from mmcompress.passes.base import Context
from mmcompress.passes.merge_bind import bind_tower
from mmcompress.passes.merge_schedule import merging_blocks, schedule_of
from mmcompress.passes.quantize_calibrate import batches
from mmcompress.surgery.alikeness import watching_pairs
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.merge_tokens import MergeTokens

ROUNDS = 8
"""How often numbers are solved for a share at most."""
USUAL = 4
"""How often the tower is run about, to estimate by."""
HINT = "use data that has, or schedule constant, which needs none"
STEPS = 30
"""Halvings of the similarity from which a floor holds."""


def merged_alike(
    settings: MergeTokens, bundle: Bundle, tower: Tower, context: Context, rounds: int = 0
) -> tuple[list[int], dict[str, Any]]:
    """Return R per block, and what was seen of the pairs they merge, solved in so many `rounds` at most, not 0.

    Raises UsageError without data, or where it has nothing for the tower.
    """
    # Blocks of the copy are bound; its weights are the model's own.
    weights = [*bundle.model.parameters(), *bundle.model.buffers()]
    trial = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model, {id(tensor): tensor for tensor in weights}))
    blocks = len(merging_blocks(tower))
    tried = [[0] * blocks]
    pairs = _seen(settings, trial, tower, tried[-1], context, 1)
    rounds = rounds or max(ROUNDS, blocks + 1 if settings.similarity else 0)
    while True:
        tried.append(_solved(settings, bundle, tower, pairs))
        if tried[-1] in tried[:-1] or len(tried) > rounds:
            break
        pairs = _seen(settings, trial, tower, tried[-1], context, len(tried))
    settled = tried[-1] == tried[-2]
    if not settled:
        pairs = _seen(settings, trial, tower, tried[-1], context, len(tried))
    facts = _facts(settings, tried[-1], pairs)
    context.progress.say(_line(tried[-1], facts))
    return tried[-1], {"alike": {**facts, "runs": len(tried) - settled, "settled": settled}}


def _solved(settings: MergeTokens, bundle: Bundle, tower: Tower, pairs: Sequence[Tensor]) -> list[int]:
    """Return R per block by the `pairs` (S, K) that each block can merge."""
    if settings.similarity is None:
        return schedule_of(settings, bundle, tower, mean_amounts(pairs))
    stream = tower.stream
    assert stream is not None, "check refuses towers without a stream"
    most = stream.tokens - least_left(settings.floor, stream.tokens, stream.protected)

    def at(similarity: float) -> list[int]:
        return capped(amounts_for_almost_all(pairs, similarity), stream.tokens, stream.protected)

    if sum(at(settings.similarity)) <= most:
        return at(settings.similarity)
    low, high = settings.similarity, 1.5
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(at(middle)) <= most else (middle, high)
    return at(high)


def least_left(floor: float, tokens: int, protected: int) -> int:
    """Return how many tokens are left at least for the share `floor`: one that is not protected, if there are any."""
    return min(tokens, max(protected + 1, math.ceil(round(floor * tokens, 9))))


def _seen(
    settings: MergeTokens, trial: Bundle, tower: Tower, merged: list[int], context: Context, run: int
) -> list[Tensor]:
    """Return the pairs (S, K) that each block can merge when the blocks of `trial` merge as `merged` says."""
    bind_tower(trial, tower, merged, settings.method, settings.proportional_attention)
    blocks = merging_blocks(tower)
    modules = [trial.module(block.path) for block in blocks]
    with evaluating(trial.model), torch.inference_mode(), watching_pairs(modules) as found:
        label, most = f"alikeness, run {run}", context.num_samples
        for inputs in batches(trial, tower.name, context, most, label, "comparing the tokens", HINT):
            trial.encode(tower.name, inputs)
    active = range(settings.first, len(blocks), settings.every)
    seen = [torch.cat(rows).double().cpu() for rows in found]
    return [rows if index in active else rows[:, :0] for index, rows in enumerate(seen)]


def _facts(settings: MergeTokens, merged: Sequence[int], pairs: Sequence[Tensor]) -> dict[str, Any]:
    """Return how alike the least alike pair is that each block merges: in the worst sample, in 95 of 100, in the median one.

    None for blocks that merge nothing. For a `similarity`: the largest share of samples that lose a less alike pair in some block.
    """
    least = {index: _least_alike(pairs[index][:, :removed]) for index, removed in enumerate(merged) if removed}

    def of_each(pick: Callable[[list[float]], float]) -> list[float | None]:
        return [round(pick(least[index]), 4) if index in least else None for index in range(len(merged))]

    found: dict[str, Any] = {
        "samples": len(pairs[0]),
        "least_alike": {"min": of_each(min), "p5": of_each(available), "median": of_each(statistics.median)},
    }
    if settings.similarity is not None:
        below = [sum(number < settings.similarity for number in numbers) / len(numbers) for numbers in least.values()]
        found["share_less_alike"] = round(max(below, default=0.0), 4)
    return found


def _least_alike(merged: Tensor) -> list[float]:
    """Return for each sample how alike the least alike pair is of those `merged` (S, R); padding costs nothing."""
    numbers: list[float] = merged.masked_fill(merged < -BEYOND, 1.0).amin(dim=-1).tolist()
    return numbers


def _line(merged: Sequence[int], facts: dict[str, Any]) -> str:
    least = [number for number in facts["least_alike"]["p5"] if number is not None]
    said = "no pair is alike"
    if least:
        said = f"each one's least alike pair has a cosine of {min(least):.3f} or more in 95 of 100"
    return f"{facts['samples']} samples: blocks merge {' '.join(map(str, merged))} tokens; {said}"
