"""What `quantize` learns from data about the layers' inputs: their grids; and about the outputs of some.

Calibration is one run of the float model over the samples, with an observer on every layer to be quantized (a second run where
ranges are to be clipped after smoothing).

Shape alphabet: T tokens, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import MmcError, UsageError
from mmcompress.ops.observers import ChannelRange, Method, MinMax, observer
from mmcompress.ops.rounding import INT8, Levels, scale_from_range, smoothing
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_channels import Channels
from mmcompress.progress import track
from mmcompress.surgery.low_rank import factor_paths
from mmcompress.surgery.watch import evaluating, padding_mask, watch_inputs, watch_outputs
from mmcompress.views import Tower

Inputs = dict[str, Tensor]
NO_CHANNELS: Mapping[str, Channels] = MappingProxyType({})
NO_OUTPUTS: Mapping[str, MinMax] = MappingProxyType({})


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of one layer's input, and the gain (C,) it gets before, if any."""

    scale: Tensor
    zero_point: Tensor
    gain: Tensor | None = None
    output_scale: Tensor | None = None
    """Of what it gives out, where that is rounded too: symmetric int8."""

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Return what a plan holds of the layer at `path`."""
        named = {
            "scale": self.scale,
            "zero_point": self.zero_point,
            "gain": self.gain,
            "output_scale": self.output_scale,
        }
        return {f"{path}.{name}": value for name, value in named.items() if value is not None}


def batches(
    bundle: Bundle,
    tower: str,
    context: Context,
    samples: int,
    label: str,
    what: str = "quantizing the activations",
    hint: str = "",
) -> Iterator[Inputs]:
    """Yield prepared inputs of up to `samples` samples that have something for this tower.

    Raises UsageError when there is no data, or nothing in it for this tower: `what` is what needs them, `hint` what else there is.
    """
    data = context.require_data(f"{what} of the {tower} tower").subset(samples, context.seed)
    found = False
    for start in track(range(0, len(data), context.batch_size), context.progress, f"{tower} {label}"):
        items: list[object] = []
        for index in range(start, min(start + context.batch_size, len(data))):
            items.extend(bundle.items(tower, data[index])[:1])
        if items:
            found = True
            yield bundle.prepare(tower, items)
    if not found:
        raise UsageError(
            f"the data '{data.name}' has nothing for the {tower} tower",
            hint=hint or f"use data that has, or --{tower}-scheme W8A16, which needs none",
        )


def offers(bundle: Bundle, context: Context, tower: str, samples: int) -> bool:
    """Return whether the data has something for this tower among the samples that would be used."""
    if context.data is None:
        return False
    chosen = context.data.subset(samples, context.seed)
    return any(bundle.items(tower, sample) for sample in chosen)


@dataclass
class Seen:
    """What samples showed of layers so far: the ranges of their inputs' channels, and of some of their outputs."""

    ranges: dict[str, ChannelRange]
    outputs: dict[str, MinMax]


def nothing_seen(paths: Sequence[str], outputs: Mapping[str, MinMax] = NO_OUTPUTS) -> Seen:
    """Return what is known of the inputs of `paths` before a sample is looked at; `outputs` watch those of some of them.

    Memory: two rows of channels and at most one histogram of 128 KiB per layer, whatever the number of samples.
    """
    return Seen({path: ChannelRange() for path in paths}, dict(outputs))


def look(bundle: Bundle, tower: Tower, seen: Seen, context: Context) -> None:
    """Add what the samples show to what was seen before."""
    watch(
        bundle,
        tower,
        {path: bundle.module(path) for path in seen.ranges},
        lambda path, tokens: seen.ranges[path].watch(tokens),
        context,
        "calibration",
        outputs={path: each.watch for path, each in seen.outputs.items()},
    )


def grids_of(
    bundle: Bundle,
    tower: Tower,
    seen: Seen,
    levels: Levels,
    context: Context,
    *,
    method: Method,
    percentile: float,
    smooth: float,
    channels: Mapping[str, Channels] = NO_CHANNELS,
) -> dict[str, Grid]:
    """Return the input grid of each layer that was called; those without one are read by their owner but never called.

    `channels`: layers whose gains the rows that make their inputs are to take over. A `method` that cuts ranges looks at the
    samples once more, with what they are multiplied by.
    """
    ranges = seen.ranges
    called = {path: bundle.module(path) for path in ranges if ranges[path].seen}
    for path in called:
        if not (ranges[path].lowest.isfinite().all() and ranges[path].highest.isfinite().all()):
            raise UsageError(
                f"the input of {path} is not finite on the calibration samples",
                hint="the model itself overflows: load it in float32, or leave bad samples out of the data",
            )
    gains = _gains(bundle, tower, called, ranges, smooth, channels) if smooth else {}
    scales = {path: each.scale(INT8)[0] for path, each in seen.outputs.items() if path in called}
    observers: dict[str, MinMax] = {path: observer(method, percentile) for path in called}
    if method != "min-max":

        def record(path: str, tokens: Tensor) -> None:
            observers[path].watch(tokens * gains[path] if path in gains else tokens)

        watch(bundle, tower, called, record, context, "clipping")
        return {path: Grid(*observers[path].scale(levels), gains.get(path), scales.get(path)) for path in called}
    grids = {}
    for path in called:
        gain = gains.get(path)
        # 0 is always on the grid: padding and masked values are exactly 0 and must stay so.
        lowest, highest = (end if gain is None else end * gain for end in (ranges[path].lowest, ranges[path].highest))
        span = lowest.min().clamp_max(0), highest.max().clamp_min(0)
        grids[path] = Grid(*scale_from_range(*span, levels), gain, scales.get(path))
    return grids


def calibrate(
    bundle: Bundle,
    tower: Tower,
    paths: Sequence[str],
    levels: Levels,
    context: Context,
    *,
    method: Method,
    percentile: float,
    smooth: float,
    channels: Mapping[str, Channels] = NO_CHANNELS,
) -> dict[str, Grid]:
    """Look at all samples, and return the grids (see `grids_of`)."""
    seen = nothing_seen(paths)
    look(bundle, tower, seen, context)
    how = {"method": method, "percentile": percentile, "smooth": smooth, "channels": channels}
    return grids_of(bundle, tower, seen, levels, context, **how)  # type: ignore[arg-type]


def watch(
    bundle: Bundle,
    tower: Tower,
    modules: Mapping[str, nn.Module],
    record: Callable[[str, Tensor], None],
    context: Context,
    label: str,
    what: str = "quantizing the activations",
    begin: Callable[[Inputs], None] = lambda inputs: None,
    complete: Callable[[str], None] = lambda path: None,
    hint: str = "",
    outputs: Mapping[str, Callable[[Tensor], None]] = MappingProxyType({}),
) -> None:
    """Run the calibration samples and call `record(path, tokens (T, C))` with what each module is given.

    `what` needs them, and `hint` says what else there is, where there are none. `begin` is told the inputs of a batch whenever it
    is run or goes on, `complete` each path once its module has been given all it will be, also one that is never called. `outputs`
    are called with what those of `modules` give out, (T, R). Raises MmcError where a module is called again after that.
    """
    holders = Counter(id(parameter) for _, parameter in bundle.model.named_parameters(remove_duplicate=False))
    weights = {path: id(module.get_parameter("weight")) for path, module in modules.items()}
    # Where a table shares the weight, it is the table that comes to it first.
    alone = {weight: path for path, weight in weights.items() if holders[weight] == 1}
    completed: set[str] = set()

    def recorded(path: str, tokens: Tensor) -> None:
        if path in completed:
            raise MmcError(
                f"{path} is called more than once, which cannot be followed layer by layer",
                hint="use a machine with memory for the whole model",
            )
        record(path, tokens)

    def reached(tensor: Tensor) -> None:
        path = alone.get(id(tensor))
        if path is not None and path not in completed:
            if not completed:
                context.progress.start(f"{tower.name} {label}, layer by layer", len(alone))
            completed.add(path)
            complete(path)
            context.progress.advance()

    def goes_on(inputs: Inputs) -> None:
        seen.mask = padding_mask(inputs)
        begin(inputs)

    shown = batches(bundle, tower.name, context, context.num_samples, label, what, hint)
    makers = {path: modules[path] for path in outputs}
    with (
        evaluating(bundle.model),
        watch_inputs(modules, recorded, _reads_encoder(tower)) as seen,
        watch_outputs(makers, lambda path, tokens: outputs[path](tokens), seen),
    ):
        for _ in bundle.encode_all(tower.name, shown, goes_on, reached):
            pass
    if completed:
        context.progress.finish()
    for path in modules:
        if path not in completed:
            complete(path)


def _gains(
    bundle: Bundle,
    tower: Tower,
    modules: Mapping[str, nn.Module],
    ranges: Mapping[str, ChannelRange],
    smooth: float,
    channels: Mapping[str, Channels],
) -> dict[str, Tensor]:
    """Return the gain of every Linear; layers that read the same input share one, so that it is rounded only once.

    A Linear that shares its weight with an embedding table has none.
    """
    tied = {linear for _, linear in tower.tied}
    gains = {}
    for group in readers_of_one_input(tower, [path for path in modules if path not in tied]):
        linears = [path for path in group if isinstance(modules[path], nn.Linear)]
        if linears:
            each = [bundle.layer(path).get_parameter("weight").detach().abs().amax(0).float() for path in linears]
            seen, largest = ranges[linears[0]].largest(), torch.stack(each).amax(0)
            if linears[0] in channels:
                own = channels[linears[0]]
                seen, largest = (own.once(values, partial(torch.amax, dim=1)) for values in (seen, largest))
            gain = 1 / smoothing(seen, largest, smooth)
            gains.update(dict.fromkeys(linears, gain))
    return gains


def readers_of_one_input(tower: Tower, paths: Sequence[str]) -> list[list[str]]:
    """Return `paths` such that those which are given one and the same input stand together."""
    parts = [part for block in tower.blocks for part in (block.attention, block.mlp) if part]
    known = [_with_factors(part.writers) for part in parts]
    known += [_reads_encoder(tower)]
    shared = [[path for path in group if path in paths] for group in known]
    alone = [[path] for path in paths if not any(path in group for group in known)]
    return [group for group in (*shared, *alone) if group]


def _reads_encoder(tower: Tower) -> tuple[str, ...]:
    """Return the key and value Linears of all cross-attentions: one and the same input, of other tokens than the tower's."""
    return _with_factors([path for block in tower.blocks if block.cross for path in block.cross.writers[1:]])


def _with_factors(paths: Sequence[str]) -> tuple[str, ...]:
    """Return `paths`, each with the one that reads its input where it has two factors."""
    return tuple(own for path in paths for own in (path, factor_paths(path)[0]))
