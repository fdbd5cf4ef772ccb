"""What `factorize` learns of a layer: its directions, and what dropping each costs, from statistics of the uncut model.

All layers are looked at in the uncut model, in one shot, as in `prune_repair`: a plan changes nothing. So once earlier layers are
factorized, a layer's inputs differ from those it was fitted on.

One currency for all layers (`weigh`):

- *effect*: how far an error of the layer's outputs moves what the tower gives out, to first order: tokens count by the squared
  gradient of a random direction of the normalised embedding there (`stream_by_effect`), channels by the gradients' second moment.
  Losses are then squared displacements, summed over the tokens of a sample, averaged over samples, as in Taylor scores.
- *energy*: every token and channel alike; losses are shares of the layer's output energy, so that every layer gives up as much.

Where few tokens were seen, moments are shrunk as in `ops.reconstruction`.

Memory: the moments of some layers at a time (an eighth of the model's bytes, or 512 MiB where that is more); of each layer the
factors of the largest rank that pays, which together take at most what the layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import low_rank
from mmcompress.ops.low_rank import Directions
from mmcompress.ops.reconstruction import shrinkage
from mmcompress.passes.base import Context
from mmcompress.passes.factorize_ranks import Layer
from mmcompress.passes.prune_effects import stream_by_effect
from mmcompress.passes.quantize_calibrate import watch
from mmcompress.progress import track
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.watch import MOMENTS_BYTES, Sums

if TYPE_CHECKING:
    from mmcompress.passes.factorize import Factorize


@dataclass(frozen=True)
class Fitted:
    """What a layer can become: the first `rank` directions, for any rank up to the largest that pays."""

    directions: Directions
    """Its losses are those of all directions, in the currency of all layers; factors are there up to the largest rank that pays."""
    mean: Tensor | None
    """E[x] (in,) of a layer with a bias to write to, else None."""

    def tensors(self, path: str, linear: nn.Linear, rank: int) -> dict[str, Tensor]:
        """Return the parameters of the layer at `path` at some rank, by name."""
        up, down = self.directions.factors(rank)
        made = {f"{path}.down.weight": down.to(linear.weight), f"{path}.up.weight": up.to(linear.weight)}
        if linear.bias is not None and self.mean is not None:
            weight, bias, mean = linear.weight.detach().double(), linear.bias.detach().double(), self.mean.double()
            lost = weight @ mean - up.double() @ (down.double() @ mean)
            made[f"{path}.up.bias"] = (bias + lost).to(linear.bias)
        return made


class Inputs(Sums):
    """All second moments of a layer's inputs, and the mean size of each channel."""

    def __init__(self) -> None:
        super().__init__(full=True)
        self.sizes = Sums(full=False)

    def add(self, states: Tensor, weights: Tensor | None = None) -> None:
        super().add(states, weights)
        self.sizes.add(states.abs(), weights)


@dataclass(frozen=True)
class Seen:
    """What samples showed of a layer."""

    inputs: Inputs
    gradients: Sums | None
    """Of its outputs, where effects are weighed."""
    samples: int
    """How many its tower was given."""


def fitted(settings: Factorize, bundle: Bundle, layers: Sequence[Layer], context: Context) -> dict[str, Fitted]:
    """Return what each of `layers` can become, by path. Raises UsageError where a method needs data that is not there."""
    generator = torch.Generator().manual_seed(context.seed)
    if not settings.looks_at_data:
        return {layer.path: fit_layer(settings, bundle, layer, generator) for layer in layers}
    found: dict[str, Fitted] = {}
    for part in _parts(bundle, layers):
        seen = look(settings, bundle, part, context)
        for layer in track(part, context.progress, "singular values", len(part)):
            found[layer.path] = fit_layer(settings, bundle, layer, generator, seen.pop(layer.path))
        give_back_freed()
    return found


def look(settings: Factorize, bundle: Bundle, layers: Sequence[Layer], context: Context) -> dict[str, Seen]:
    """Return what the calibration samples show of `layers`, by path; all at once."""
    label = f"method={settings.method}"
    inputs = {layer.path: Inputs() for layer in layers}
    if settings.weigh == "effect":
        gradients = {layer.path: Sums(full=True) for layer in layers}
        counts = stream_by_effect(bundle, inputs, context, label, gradients, of="factorize")
        return {layer.path: Seen(inputs[layer.path], gradients[layer.path], counts[layer.tower]) for layer in layers}
    what = f"factorize with {label}"
    for tower in bundle.towers():
        mine = {path: bundle.module(path) for path in inputs if tower.owns(path)}
        if mine:
            watch(bundle, tower, mine, lambda path, tokens: inputs[path].add(tokens), context, label, what)
    return {path: Seen(sums, None, 1) for path, sums in inputs.items()}


def fit_layer(
    settings: Factorize, bundle: Bundle, layer: Layer, generator: torch.Generator, seen: Seen | None = None
) -> Fitted:
    """Return what a layer can become. Raises UsageError where its singular values are not finite."""
    linear = bundle.module(layer.path)
    assert isinstance(linear, nn.Linear), f"{layer.path} was not checked to be a Linear"
    weight = linear.weight.detach()
    root = mean = moment = left = None
    if seen is not None and seen.inputs.weight:
        mean = seen.inputs.mean() if linear.bias is not None else None
        moment = _shrunk(seen.inputs, mean)
        root = _ROOTS[settings.method](seen.inputs, moment, settings.alpha)
        if seen.gradients is not None:
            gradients = _shrunk(seen.gradients, None)
            left = low_rank.root_of(gradients / gradients.diagonal().sum())
    made = low_rank.directions(weight, root, moment, left)
    if seen is not None and not seen.inputs.weight:
        scale = 0.0  # nothing this Linear writes reaches the embedding: any directions do
    elif seen is not None and seen.gradients is not None:
        scale = seen.inputs.weight / seen.samples
    else:
        scale = 1 / float(made.losses.sum() or 1.0)
    losses = made.losses * scale
    if not losses.isfinite().all():
        raise UsageError(
            f"the singular values of {layer.path} are not finite",
            hint="the model overflows on this data: load it in float32, or leave bad samples out",
        )
    if settings.directions == "random":
        # Priced as what they stand in for, so that every layer gets the rank it would have.
        made = low_rank.random_directions(weight, generator, moment, left)
    most = layer.ranks[-1] if layer.ranks else 0
    return Fitted(Directions(made.up[:, :most].float(), made.down[:most].float(), losses), mean)


_ROOTS: dict[str, Callable[[Inputs, Tensor, float], Tensor]] = {
    "svd-llm": lambda seen, moment, alpha: low_rank.root_of(moment),
    "asvd": lambda seen, moment, alpha: seen.sizes.mean().double().clamp_min(1e-12) ** alpha,
}


def _shrunk(sums: Sums, mean: Tensor | None) -> Tensor:
    """Return the covariance (C, C), or without a mean the second moment, as far as the tokens tell it from noise; float64."""
    moment = sums.second_moment().double()
    if mean is not None:
        moment.addr_(mean.double(), mean.double(), alpha=-1)
    share = shrinkage(moment, sums.count)
    scale = float(moment.diagonal().mean())
    moment *= 1 - share
    moment.diagonal().add_(share * scale)
    return moment


def _parts(bundle: Bundle, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Split the layers so that the moments of a part fit."""
    limit = max(MOMENTS_BYTES, sum(p.nbytes for p in bundle.model.parameters()) // 8)
    parts: list[list[Layer]] = []
    used = limit
    for layer in layers:
        size = 4 * (layer.shape[0] ** 2 + layer.shape[1] ** 2)
        if used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(layer)
        used += size
    return parts
