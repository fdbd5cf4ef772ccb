"""The weights that `sparsify` decides on, of one tower, from what calibration samples show of its layers' inputs.

Layers that the samples never come to (behind the block that is read) go by magnitude.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.gptq import compensation
from mmcompress.ops.importance import wanda
from mmcompress.ops.sparsity import Pattern, sparsegpt
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_balance import Balance, Kind, balance_for
from mmcompress.passes.quantize_calibrate import readers_of_one_input, watch
from mmcompress.passes.quantize_moments import Inputs, inputs_of, runs
from mmcompress.surgery.watch import Sums
from mmcompress.views import Tower

Method = Literal["sparsegpt", "wanda", "magnitude", "random"]
FROM_SAMPLES = ("sparsegpt", "wanda")
WITHOUT = "or use method magnitude, which needs no data"


def sparse_weights(
    method: Method,
    update: bool,
    kind: Kind,
    pattern: Pattern,
    bundle: Bundle,
    tower: Tower,
    linears: Mapping[str, nn.Linear],
    context: Context,
) -> dict[str, Tensor]:
    """Return the new weight (out, in) of each Linear, by path. Raises UsageError without data where `method` needs some."""
    made: dict[str, Tensor] = {}

    def use(group: list[str], seen: Inputs) -> None:
        how = compensation(seen.moment, order=torch.arange(len(seen.moment), device=seen.moment.device))
        silent = seen.moment.diagonal() <= 0
        for path in group:
            weight = linears[path].weight.detach()
            scores = _drawn(weight, path, context.seed) if method == "random" else None
            made[path] = sparsegpt(weight, how, silent, pattern, scores).to(weight.dtype)

    if method == "sparsegpt" or update:
        what = "making weights sparse by sparsegpt"
        balance = balance_for(kind, bundle, tower, context)
        inputs_of(bundle, tower, linears, context, balance, False, what, use, _hint(tower))
    elif method == "wanda":
        balance = balance_for(kind, bundle, tower, context)
        for path, norms in input_norms(bundle, tower, linears, context, balance).items():
            weight = linears[path].weight.detach()
            made[path] = _zeroed(weight, wanda(weight.float(), norms), pattern)
    for path, linear in linears.items():
        if path not in made:
            weight = linear.weight.detach()
            scores = _drawn(weight, path, context.seed) if method == "random" else weight.float().abs()
            made[path] = _zeroed(weight, scores, pattern)
    return made


def input_norms(
    bundle: Bundle, tower: Tower, linears: Mapping[str, nn.Linear], context: Context, balance: Balance
) -> dict[str, Tensor]:
    """Return sqrt(E[x^2]) of each channel (in,) that a Linear reads over calibration tokens, of those that are called."""
    groups = readers_of_one_input(tower, list(linears))
    sums = {group[0]: Sums(full=False) for group in groups}

    def record(path: str, tokens: Tensor) -> None:
        sums[path].add(tokens, balance.counts(path, tokens))

    watched = {path: linears[path] for path in sums}
    what = "making weights sparse by wanda"
    watch(bundle, tower, watched, record, context, "norms", what, balance.begin, hint=_hint(tower))
    seen = {group[0]: group for group in groups if sums[group[0]].second is not None}
    return {path: sums[first].norms(centred=False) for first, group in seen.items() for path in group}


def looks(
    method: Method, update: bool, kind: Kind, bundle: Bundle, tower: Tower, linears: Mapping[str, nn.Linear]
) -> int:
    """Return how often the samples are run through `tower`; a run with gradients is counted as three."""
    if method not in FROM_SAMPLES and not update:
        return 0
    backwards = 3 if kind == "modality" and tower.prompt else 0
    return backwards + (1 if method == "wanda" else len(runs(bundle, tower, linears)))


def _zeroed(weight: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    return weight.masked_fill(pattern.lowest(scores), 0)


def _drawn(weight: Tensor, path: str, seed: int) -> Tensor:
    """Return scores (out, in) that say nothing; those of a layer do not depend on which others there are."""
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(path.encode()))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def _hint(tower: Tower) -> str:
    return f"use data that has, leave the {tower.name} tower out with --towers, {WITHOUT}"
