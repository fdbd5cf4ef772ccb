"""What `narrow` learns of a stream from data, and the values that its narrow parts get (`ops.residual`).

Memory: a second moment (C, C) in float32 for each norm, together at most about a sixth of the blocks' own weights, and twice that
where norms are LayerNorms; and all that is new of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import residual
from mmcompress.ops.reconstruction import shrinkage
from mmcompress.passes.base import Context
from mmcompress.passes.narrow_units import Stream, is_centred
from mmcompress.passes.quantize_calibrate import watch
from mmcompress.progress import track
from mmcompress.surgery.narrowing import without_gain
from mmcompress.surgery.watch import Sums


@dataclass(frozen=True)
class Moments:
    """E[n(x) n(x)'] (C, C) of every norm's outputs before its gain, as far as the tokens tell it from noise."""

    of: dict[str, Tensor]
    means: dict[str, Tensor]
    """E[n(x)] (C,)."""
    around: dict[str, Tensor]
    """Of LayerNorms: the covariance (C, C)."""

    def pooled(self) -> Tensor:
        """Return the mean over the norms, in which each block's readers count alike."""
        return torch.stack([moment.double() for moment in self.of.values()]).mean(0)


def look(bundle: Bundle, stream: Stream, context: Context) -> Moments:
    """Return what the calibration samples show of a stream. Raises UsageError without data, or where it overflows."""
    centred = is_centred(bundle, stream)
    plain = {path: without_gain(bundle.module(path)) for path in stream.norms}
    sums = {path: Sums(full=True) for path in stream.norms}
    # Often one token of each sample is read behind the last norm, and is unlike the others.
    pooling = stream.norms[stream.last][0] if centred and not stream.widens else ""
    held: dict[str, Tensor] = {}

    def record(path: str, tokens: Tensor) -> None:
        if path == pooling:
            sums[stream.last].add(plain[stream.last](_read(held, tokens)))
        elif path == stream.last and pooling:
            held["all"] = tokens
        else:
            sums[path].add(plain[path](tokens))

    def hold(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        held.update(given=given[0].detach(), made=made.detach())

    handle = bundle.module(stream.last).register_forward_hook(hold)
    try:
        watch(
            bundle,
            bundle.tower(stream.tower),
            {path: bundle.module(path) for path in (*stream.norms, *filter(None, [pooling]))},
            record,
            context,
            "residual stream",
            "narrowing the stream",
            hint=f"use data that has, or leave the {stream.tower} tower out with --towers",
        )
    finally:
        handle.remove()
    made = Moments({}, {}, {})
    for path, seen in sums.items():
        moment = seen.second_moment()
        if not moment.isfinite().all():
            raise UsageError(
                f"what {path} gives out is not finite on the calibration samples",
                hint="the model overflows on this data: load it in float32, or leave bad samples out",
            )
        made.means[path] = seen.mean()
        if centred:
            made.around[path] = _shrunk(moment - torch.outer(made.means[path], made.means[path]), seen.count, centred)
        made.of[path] = _shrunk(moment, seen.count, centred)
    return made


def _read(held: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return those of the states a norm was given (B, N, C) whose outputs are `tokens` (B, C); all where none are one by one."""
    made = held["made"]
    if made.dim() == 3 and len(made) == len(tokens):
        read = (made == tokens[:, None]).all(-1)
        if read.any(1).all():
            return held["given"][read]
    return held["all"]


def readings(bundle: Bundle, stream: Stream, moments: Moments) -> Tensor:
    """Return the sum of W'W (C, C) over all that reads the stream, gains included, as if each norm's readers gave out alike."""
    total = torch.zeros((), dtype=torch.float64)
    for norm, readers in stream.norms.items():
        gain = bundle.module(norm).get_parameter("weight").detach().double()
        weights = [bundle.module(path).get_parameter("weight").detach().double() * gain for path in readers]
        stacked = torch.cat(weights) if weights else gain.diag()
        read = stacked.T @ stacked
        total = total.to(read) + read / float((read * moments.of[norm]).sum())
    return total


def _shrunk(moment: Tensor, count: float, centred: bool) -> Tensor:
    """Return a moment (C, C) of `count` tokens drawn towards one in which all directions are alike, in place.

    `centred`: towards one without a mean over channels, as LayerNorms give it out.
    """
    share = shrinkage(moment, count)
    size = share * (float(moment.diagonal().mean()) or 1.0)
    moment.mul_(1 - share)
    if centred:
        size *= len(moment) / (len(moment) - 1)
        moment.sub_(size / len(moment))
    moment.diagonal().add_(size)
    return moment


def basis_for(
    method: str, moments: Moments, width: int, seed: int, centred: bool = False, read: Tensor | None = None
) -> Tensor:
    """Return the directions (C, K) that stay; with `centred` those of a stream without a mean, in channels without one.

    `read` (C, C): what `readings` gives, for method "readers".
    """
    pooled = moments.pooled()
    if not centred:
        return _directions(method, pooled, width, seed, read)
    inside, outside = (residual.without_mean(channels).to(pooled.device) for channels in (len(pooled), width))
    if method == "channels":
        return residual.largest_channels(pooled, width) @ outside @ outside.T
    within = None if read is None else inside.T @ read @ inside
    return inside @ _directions(method, inside.T @ pooled @ inside, width - 1, seed, within) @ outside.T


def _directions(method: str, second: Tensor, width: int, seed: int, read: Tensor | None) -> Tensor:
    if read is not None:
        return residual.told(second, read, width)
    if method == "random":
        drawn = residual.random_directions(len(second), width, torch.Generator().manual_seed(seed))
        return drawn.to(second.device)
    return residual.largest_channels(second, width) if method == "channels" else residual.leading(second, width)


def narrow_values(
    bundle: Bundle, stream: Stream, moments: Moments, basis: Tensor, context: Context
) -> dict[str, Tensor]:
    """Return every parameter of the narrow stream, by its name once the structure is cut."""
    tensors: dict[str, Tensor] = {}
    parts = values_by_part(bundle, stream, moments, basis)
    for values in track(parts, context.progress, "fitting readers", parts_of(stream)):
        tensors |= values
    return tensors


def parts_of(stream: Stream) -> int:
    """Return how many parts `values_by_part` yields."""
    return len(stream.norms) + bool(stream.entry) + len(stream.rows) + len(stream.writers)


@torch.no_grad()
def values_by_part(
    bundle: Bundle, stream: Stream, moments: Moments | None, basis: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Yield the parameters of one part after the other, by name once the structure is cut: norms with their readers come first.

    What a part is made of is its own, so its values may be put in before the next is made; but for an output layer that shares
    a table's weight, which comes before the table. Without `moments` nothing is cut: `basis` (C, C) turns.
    """
    fit = _centred_readers if is_centred(bundle, stream) else _readers
    basis = basis.to(bundle.module(stream.last).get_parameter("weight").device)
    for norm in stream.norms:
        yield fit(bundle, stream, norm, moments, basis)
    if stream.entry:
        yield {f"{stream.entry}.1.weight": basis.T.to(bundle.module(stream.entry).get_parameter("weight"))}
    for path, name in stream.rows:
        yield {f"{path}.{name}": residual.written(bundle.module(path).get_parameter(name), basis)}
    for path in stream.writers:
        yield _written(bundle, path, stream.scales.get(path, ""), basis)


def _written(bundle: Bundle, path: str, scale: str, basis: Tensor) -> dict[str, Tensor]:
    """Return a layer that writes into the stream, and ones for what multiplied that (`scale`)."""
    factor = bundle.model.get_parameter(scale) if scale else torch.ones(())
    made: dict[str, Tensor] = {}
    for name, parameter in bundle.module(path).named_parameters(recurse=False):
        # What a layer writes is along its rows: (C, in, …) or (C,).
        rows = residual.written(parameter.movedim(0, -1).double() * factor.double(), basis)
        made[f"{path}.{name}"] = rows.movedim(-1, 0).to(parameter.dtype)
    return {**made, scale: torch.ones(basis.shape[1]).to(factor)} if scale else made


def _readers(bundle: Bundle, stream: Stream, norm: str, moments: Moments | None, basis: Tensor) -> dict[str, Tensor]:
    """Return an RMS norm and what reads it."""
    gain = bundle.module(norm).get_parameter("weight")
    moment, readers = moments.of[norm] if moments else None, stream.norms[norm]
    scale = torch.full((basis.shape[1],), residual.norm_scale(moment, basis)).to(gain)
    made = {f"{norm}.0.weight" if stream.tied in readers else f"{norm}.weight": scale}
    for path in readers:
        weight = bundle.module(path).get_parameter("weight")
        fitted = residual.reader(weight, gain, moment, basis)
        if path == stream.tied:
            fitted = residual.mixing(weight.double() @ basis, fitted)
            path = f"{norm}.1"
        made[f"{path}.weight"] = fitted.to(weight)
    return made


def _centred_readers(
    bundle: Bundle, stream: Stream, norm: str, moments: Moments | None, basis: Tensor
) -> dict[str, Tensor]:
    """Return a LayerNorm and what reads it, with biases; without readers, the Linear (K, C) behind it."""
    module = bundle.module(norm)
    gain = module.get_parameter("weight")
    bias = torch.zeros_like(gain) if module.bias is None else module.get_parameter("bias")
    covariance, mean = (moments.around[norm], moments.means[norm]) if moments else (None, None)
    widens = stream.widens and norm == stream.last
    at = f"{norm}.0" if widens else norm
    scale = residual.norm_scale(moments.of[norm] if moments else None, basis)
    made = {f"{at}.weight": torch.full((basis.shape[1],), scale).to(gain)}
    if module.bias is not None:
        made[f"{at}.bias"] = torch.zeros(basis.shape[1]).to(gain)
    readers = {path: bundle.module(path) for path in stream.norms[norm]}
    weights: dict[str, Tensor] = {path: linear.get_parameter("weight") for path, linear in readers.items()}
    if widens:
        weights[f"{norm}.1"] = torch.eye(len(gain)).to(gain)
    for path, weight in weights.items():
        fitted = residual.reader(weight, gain, covariance, basis)
        shift = residual.shift(weight, gain, bias, mean, basis, fitted)
        linear = readers.get(path)
        own = 0.0 if linear is None or linear.bias is None else linear.get_parameter("bias").double()
        made |= {f"{path}.weight": fitted.to(weight), f"{path}.bias": (own + shift).to(weight)}
    return made
