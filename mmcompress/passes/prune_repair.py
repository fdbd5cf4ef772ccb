"""Compensation for `prune`: new readers for the units that stay, from statistics of the uncut model on calibration data.

Every reader is refitted to give what it gives in the uncut model, from what the kept units give it there. Blocks are not cut and
refitted one after the other with activations measured again, as Wanda and SparseGPT do, because a plan changes nothing. So once
earlier blocks are cut, a reader's inputs differ from those it was fitted on, and the guarantee of `ops.reconstruction` holds for
each Linear by itself, not for the embedding.

Tokens are weighted by how much they matter for the embedding (`stream_by_effect`). Unweighted, the repair would trade error at the
few tokens a tower is read from for error at the many it is not; with a class-token readout that can be worse than no repair.

Memory: a mean per channel for "bias"; for "least-squares" the second moments of as many readers at a time as fit in
`MOMENTS_BYTES`, or in an eighth of the model's bytes where that is more (one reader at least), so wide or deep models cost several
passes over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.reconstruction import Moments, repair
from mmcompress.passes.base import Context
from mmcompress.passes.prune_effects import stream_by_effect
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.linears import spread
from mmcompress.surgery.watch import MOMENTS_BYTES, Sums


def repaired_readers(
    bundle: Bundle, kept: Mapping[Group, Sequence[int]], context: Context, method: str, ridge: float
) -> dict[str, Tensor]:
    """Return new weights (out, K) and biases (out,) of the readers of `kept`, by parameter name."""
    full = method == "least-squares"
    tensors: dict[str, Tensor] = {}
    for part in parts(bundle, list(kept), full):
        sums = {group.reader: Sums(full) for group in part}
        stream_by_effect(bundle, sums, context, f"compensate={method}")
        for group in part:
            reader = bundle.module(group.reader)
            assert isinstance(reader, nn.Linear), f"{group.reader} was not checked to be a Linear"
            seen = sums.pop(group.reader)
            if not seen.weight:
                # Nothing this Linear writes reaches the embedding; there is nothing to repair.
                continue
            moments = Moments(seen.mean(), seen.second_moment() if full else None, seen.count)
            columns = spread(torch.tensor(kept[group], device=reader.weight.device), group.width)
            bias = None if reader.bias is None else reader.bias.detach()
            weight, moved = repair(reader.weight.detach(), bias, columns, moments, ridge)
            tensors[f"{group.reader}.weight"] = weight
            if moved is not None:
                tensors[f"{group.reader}.bias"] = moved
            del seen, moments
        give_back_freed()
    return tensors


def parts(bundle: Bundle, groups: Sequence[Group], full: bool) -> list[list[Group]]:
    """Split the groups so that the second moments of a part fit; one part where only means are kept.

    Each part costs another look at all samples.
    """
    if not full:
        return [list(groups)]
    limit = max(MOMENTS_BYTES, sum(p.numel() * p.element_size() for p in bundle.model.parameters()) // 8)
    found: list[list[Group]] = []
    used = limit
    for group in groups:
        size = 4 * (group.units * group.width) ** 2
        if used + size > limit:
            found.append([])
            used = 0
        found[-1].append(group)
        used += size
    return found
