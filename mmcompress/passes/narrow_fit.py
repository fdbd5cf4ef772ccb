"""What `narrow` learns of a stream from data, and the values that its narrow parts get (`ops.residual`).

Memory: a second moment (C, C) in float32 for each norm, together at most about a sixth of the blocks' own weights; and all that is
new of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import residual
from mmcompress.ops.reconstruction import shrinkage
from mmcompress.passes.base import Context
from mmcompress.passes.narrow_units import Stream
from mmcompress.passes.quantize_calibrate import watch
from mmcompress.progress import track
from mmcompress.surgery.narrowing import without_gain
from mmcompress.surgery.watch import Sums


@dataclass(frozen=True)
class Moments:
    """E[n(x) n(x)'] (C, C) of every norm's outputs before its gain, as far as the tokens tell it from noise."""

    of: dict[str, Tensor]

    def pooled(self) -> Tensor:
        """Return the mean over the norms, in which each block's readers count alike."""
        return torch.stack([moment.double() for moment in self.of.values()]).mean(0)


def look(bundle: Bundle, stream: Stream, context: Context) -> Moments:
    """Return what the calibration samples show of a stream. Raises UsageError without data, or where it overflows."""
    plain = {path: without_gain(bundle.module(path)) for path in stream.norms}
    sums = {path: Sums(full=True) for path in stream.norms}
    watch(
        bundle,
        bundle.tower(stream.tower),
        {path: bundle.module(path) for path in stream.norms},
        lambda path, tokens: sums[path].add(plain[path](tokens)),
        context,
        "residual stream",
        "narrowing the stream",
        hint=f"use data that has, or leave the {stream.tower} tower out with --towers",
    )
    found: dict[str, Tensor] = {}
    for path, seen in sums.items():
        moment = seen.second_moment()
        if not moment.isfinite().all():
            raise UsageError(
                f"what {path} gives out is not finite on the calibration samples",
                hint="the model overflows on this data: load it in float32, or leave bad samples out",
            )
        share = shrinkage(moment, seen.count)
        size = float(moment.diagonal().mean())
        moment.mul_(1 - share).diagonal().add_(share * size)
        found[path] = moment
    return Moments(found)


def basis_for(method: str, moments: Moments, width: int, seed: int) -> Tensor:
    """Return the directions (C, K) that stay."""
    pooled = moments.pooled()
    if method == "random":
        drawn = residual.random_directions(len(pooled), width, torch.Generator().manual_seed(seed))
        return drawn.to(pooled.device)
    return residual.largest_channels(pooled, width) if method == "channels" else residual.leading(pooled, width)


@torch.no_grad()
def narrow_values(
    bundle: Bundle, stream: Stream, moments: Moments, basis: Tensor, context: Context
) -> dict[str, Tensor]:
    """Return every parameter of the narrow stream, by its name once the structure is cut."""
    tensors: dict[str, Tensor] = {}
    for path, name in stream.rows:
        tensors[f"{path}.{name}"] = residual.written(bundle.module(path).get_parameter(name), basis)
    for path in stream.writers:
        linear = bundle.module(path)
        tensors[f"{path}.weight"] = residual.written(linear.get_parameter("weight").T, basis).T
        if linear.bias is not None:
            tensors[f"{path}.bias"] = residual.written(linear.get_parameter("bias"), basis)
    for norm, readers in track(list(stream.norms.items()), context.progress, "fitting readers", len(stream.norms)):
        gain = bundle.module(norm).get_parameter("weight")
        moment = moments.of[norm]
        scale = torch.full((basis.shape[1],), residual.norm_scale(moment, basis)).to(gain)
        mixed = stream.tied in readers
        tensors[f"{norm}.0.weight" if mixed else f"{norm}.weight"] = scale
        for path in readers:
            weight = bundle.module(path).get_parameter("weight")
            made = residual.reader(weight, gain, moment, basis)
            if path == stream.tied:
                made = residual.mixing(weight.double() @ basis, made)
                path = f"{norm}.1"
            tensors[f"{path}.weight"] = made.to(weight)
    return tensors
