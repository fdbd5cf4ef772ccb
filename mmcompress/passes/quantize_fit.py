"""Weights alone, rounded to calibration samples: the inputs' channels scaled (AWQ), ranges clipped, errors made up for (GPTQ) or
weighed together (AdaRound), what is left of them on average taken off (bias correction).

Everything is judged by what rounding does to a layer's outputs on the samples, and kept where that is less: scales for all Linears
that read one input together, clipped ranges row by row. Scales are searched with weights rounded to nearest, as in the paper, and
judged once more as weights are really rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.adaround import ITERATIONS, WORKING_BYTES, adaround
from mmcompress.ops.awq import best_strength, channel_scales
from mmcompress.ops.clipping import clipped_grid
from mmcompress.ops.gptq import Compensation, compensation, gptq, output_error
from mmcompress.ops.grouped import Grouped, nearest, nearest_grid, on_grid
from mmcompress.ops.half_quadratic import half_quadratic_grid
from mmcompress.ops.rounding import choose_scale, dequantize, quantize
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize_balance import balance_for
from mmcompress.passes.quantize_calibrate import readers_of_one_input
from mmcompress.passes.quantize_layers import candidates, group_sizes
from mmcompress.passes.quantize_moments import Inputs, inputs_of, linears_of, runs
from mmcompress.passes.quantize_schemes import AUTO, FOUR_BITS, WEIGHTS_ALONE, with_activations
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from mmcompress.surgery.quantized_base import chunks
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize

FITTED = ("gptq", "adaround")
"""The ways of rounding that look at samples."""
PRODUCTS = 3e10
"""Numbers multiplied and added a second, of a core: what AdaRound takes is forecast by it."""

Made = dict[str, PackedLinear | QuantizedLinear]


def fitted_paths(settings: Quantize, tower: Tower, schemes: Mapping[str, str]) -> list[str]:
    """Return the layers that are fitted to samples: those of weights alone that `settings` ask it for.

    A layer that shares its weight with an embedding table is none: the table's rows would be scaled too.
    """
    wanted = FOUR_BITS if settings.clip or settings.rounding in FITTED else set()
    wanted = WEIGHTS_ALONE if settings.scaling == "awq" or settings.correct_bias else wanted
    tied = {linear for _, linear in tower.tied}
    return [path for path, scheme in schemes.items() if scheme in wanted and path not in tied]


def fit_weights(
    settings: Quantize,
    bundle: Bundle,
    tower: Tower,
    schemes: Mapping[str, str],
    context: Context,
    made: Plan,
) -> dict[str, object]:
    """Add to `made` the tensors of the layers that are fitted, and how strongly each is scaled; return what to report.

    Those whose tensors `made` has, of a run that was killed, are not fitted again. Raises UsageError without data for this tower.
    """
    sizes = made.decisions["groups"]
    linears = linears_of(bundle, fitted_paths(settings, tower, schemes))
    if not linears:
        return {}
    groups = readers_of_one_input(tower, list(linears))
    missing = [path for group in groups if f"{group[0]}.strength" not in made.tensors for path in group]
    ways = [
        name
        for name, used in (
            (settings.rounding, settings.rounding in FITTED),
            ("awq", settings.scaling == "awq"),
            ("clip", settings.clip),
            ("corrected biases", settings.correct_bias),
        )
        if used
    ]
    balance = balance_for(settings.balance, bundle, tower, context)
    what = f"rounding the weights by {' and '.join(ways)}"
    awq = settings.scaling == "awq"
    channels = settings.channels(tower)

    def fit(group: list[str], seen: Inputs) -> None:
        if group[0] in channels and seen.mean_sizes is not None:
            seen = replace(seen, mean_sizes=channels[group[0]].once(seen.mean_sizes, partial(torch.mean, dim=1)))
        layers = {path: _linear(bundle, path) for path in group}
        gain = None
        if settings.scaling == "equalize" and f"{group[0]}.gain" in made.tensors:
            gain = made.tensors[f"{group[0]}.gain"].to(seen.moment.device)  # what a plan keeps lies on the CPU
        strength, best = _best(settings, layers, sizes, seen, gain)
        for path, layer in best.items():
            if strength:
                assert layer.input_gain is not None
                made.tensors[f"{path}.gain"] = layer.input_gain
            if isinstance(layer, PackedLinear):
                made.tensors.update({f"{path}.{name}": value for name, value in layer.packed_buffers()})
            if settings.correct_bias and layers[path].bias is not None:
                made.tensors[f"{path}.bias"] = layers[path].bias.detach() + _shift(layers[path], layer, seen.mean)
        # The last of the group: with it, nothing is missing.
        made.tensors[f"{group[0]}.strength"] = torch.tensor(strength, dtype=torch.float64)

    if missing:
        todo = {path: linears[path] for path in missing}
        inputs_of(bundle, tower, todo, context, balance, awq, what, fit)
    for group in groups:
        strength = float(made.tensors.get(f"{group[0]}.strength", 0.0))
        if strength:
            made.decisions["scaled"] |= dict.fromkeys(group, strength)
    return {"image_tokens_count": balance.ratios} if balance.ratios else {}


def _linear(bundle: Bundle, path: str) -> nn.Linear:
    layer = bundle.layer(path)
    assert isinstance(layer, nn.Linear), f"{path} is a {type(layer).__name__}"
    return layer


def _best(
    settings: Quantize,
    layers: Mapping[str, nn.Linear],
    sizes: Mapping[str, int],
    seen: Inputs,
    gain: Tensor | None,
) -> tuple[float, Made]:
    """Return the strength of the scales, 0 for none, and the rounded layers: those with the least error of outputs.

    `gain` (C,) is what their input is multiplied by already.
    """
    plain = Rounding(settings, seen.moment, gain)
    made = {path: plain.made(linear, sizes.get(path, 0)) for path, linear in layers.items()}
    if seen.mean_sizes is None:
        return 0.0, made
    size = sizes.get(next(iter(layers)), 0)  # of one input, all are cut alike
    parts = [linear.weight.detach()[rows] for linear in layers.values() for rows in chunks(linear.weight)]
    strength = best_strength(parts, seen.mean_sizes, seen.moment, lambda weight: plain.nearest(weight, size))
    if strength:
        scaled = Rounding(settings, seen.moment, 1 / channel_scales(seen.mean_sizes, strength))
        other = {path: scaled.made(linear, sizes.get(path, 0)) for path, linear in layers.items()}
        if _error(layers, other, seen.moment) < _error(layers, made, seen.moment):
            return strength, other
    return 0.0, made


def _error(layers: Mapping[str, nn.Linear], made: Made, moment: Tensor) -> float:
    """Return what rounding does to all outputs of `layers`."""
    total = 0.0
    for path, linear in layers.items():
        for rows in chunks(linear.weight):
            rounded = made[path].weight_rows(rows.start, min(rows.stop, linear.out_features))
            gain = made[path].input_gain
            rounded = rounded if gain is None else rounded * gain
            total += float(output_error(linear.weight.detach()[rows], rounded, moment).sum())
    return total


def _shift(linear: nn.Linear, made: PackedLinear | QuantizedLinear, mean: Tensor) -> Tensor:
    """Return what rounding takes from the outputs on average, (W - W') E[x] (R,) (Nagel et al. 2019, arXiv 1906.04721, 4.2)."""
    seen = mean.double()
    gained = seen if made.input_gain is None else seen * made.input_gain
    parts = []
    for rows in chunks(linear.weight):
        rounded = made.weight_rows(rows.start, min(rows.stop, linear.out_features))
        parts.append(linear.weight.detach()[rows].double() @ seen - rounded.double() @ gained)
    return torch.cat(parts).to(linear.weight)


def looks(settings: Quantize, bundle: Bundle, tower: Tower) -> int:
    """Return how often the samples are run through `tower`; a run with gradients is counted as three."""
    linears = _to_fit(settings, bundle, tower)
    backwards = 3 if linears and settings.balance == "modality" and tower.prompt else 0
    return len(runs(bundle, tower, linears)) + backwards


def bytes_held(settings: Quantize, bundle: Bundle, tower: Tower) -> int:
    """Return what fitting the layer with the most inputs takes: their moment in float32, and its factor (see `ops.gptq`)."""
    widest = max((linear.in_features for linear in _to_fit(settings, bundle, tower).values()), default=0)
    learned = WORKING_BYTES if settings.rounding == "adaround" and widest else 0
    return (32 if settings.rounding == "gptq" else 16) * widest**2 + learned


def learning_seconds(settings: Quantize, bundle: Bundle, tower: Tower) -> float:
    """Return about how long AdaRound takes on this machine's cores: a product with the moment in each iteration."""
    linears = _to_fit(settings, bundle, tower) if settings.rounding == "adaround" else {}
    learned = group_sizes(bundle, tower, list(linears), settings.group_size) if _has_four_bits(settings, tower) else {}
    shapes = [linears[path].weight.shape for path in learned]
    once = sum(rows * columns**2 for rows, columns in shapes) * ITERATIONS / PRODUCTS / torch.get_num_threads()
    return once * (1 + settings.clip) * (1 + (settings.scaling == "awq"))


def _has_four_bits(settings: Quantize, tower: Tower) -> bool:
    """Whether layers of `tower` get 4 bits, or may."""
    return settings.scheme_of(tower.name) in (AUTO, *FOUR_BITS)


def _to_fit(settings: Quantize, bundle: Bundle, tower: Tower) -> dict[str, nn.Linear]:
    """Return the layers of `tower` that will be fitted."""
    name = settings.scheme_of(tower.name)
    name = "W4A16" if name == AUTO else name
    scheme = with_activations(name, settings.activations)
    if scheme.inputs == "static":
        return {}
    paths = candidates(bundle, tower, settings.tables, settings.keep_float)
    sizes = group_sizes(bundle, tower, paths, settings.group_size) if scheme.weights == "int4" else {}
    schemes = dict.fromkeys(paths, scheme.otherwise or name) | dict.fromkeys(sizes, name)
    return linears_of(bundle, fitted_paths(settings, tower, schemes))


@dataclass(frozen=True)
class Rounding:
    """Rounds the weights of layers that read one input, which is multiplied by `gain` (C,) before."""

    settings: Quantize
    moment: Tensor
    """Of the input as it is, (C, C)."""
    gain: Tensor | None = None

    def made(self, linear: nn.Linear, size: int) -> PackedLinear | QuantizedLinear:
        """Return the layer in 4 bits, in groups of `size`, or in 8 bits where that is 0."""
        if not size:
            return QuantizedLinear(linear, None, self.settings.maker.weights, self.gain)
        made = PackedLinear(linear, size, gain=self.gain)
        for rows in chunks(linear.weight):
            weight = linear.weight.detach()[rows].float()
            made.set_rows(rows, self._grouped(weight if self.gain is None else weight / self.gain, size))
        return made

    def nearest(self, weight: Tensor, size: int) -> Tensor:
        """Return the floats (R, C) that a weight is rounded to in the plainest way."""
        if size:
            return nearest(weight, size).dequantized()
        scale, zero_point = choose_scale(weight, self.settings.maker.weights, axis=0)
        return dequantize(quantize(weight, scale, zero_point, self.settings.maker.weights, axis=0), scale, axis=0)

    def _grouped(self, weight: Tensor, size: int) -> Grouped:
        grid = (nearest_grid if self.settings.rounding == "nearest" else half_quadratic_grid)(weight, size)
        plain = self._on(weight, grid)
        if not self.settings.clip:
            return plain
        clipped = self._on(weight, clipped_grid(weight, self._moment, *grid))
        worse, better = (output_error(weight, each.dequantized(), self._moment) for each in (plain, clipped))
        return clipped.where(better < worse, plain)

    def _on(self, weight: Tensor, grid: tuple[Tensor, Tensor]) -> Grouped:
        if self.settings.rounding == "gptq":
            return gptq(weight, self._compensation, *grid)
        if self.settings.rounding == "adaround":
            return adaround(weight, self._moment, *grid)
        return on_grid(weight, *grid)

    @cached_property
    def _moment(self) -> Tensor:
        """The second moment of what the weights multiply."""
        return self.moment if self.gain is None else self.moment * self.gain[:, None] * self.gain

    @cached_property
    def _compensation(self) -> Compensation:
        return compensation(self._moment)
