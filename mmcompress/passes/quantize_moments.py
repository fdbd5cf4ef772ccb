"""Second moments of the inputs of a tower's Linears from calibration samples: what rounding does to outputs follows from them.

Deliberate difference from GPTQ's and AWQ's papers: every layer's inputs are those of the float model, not of one whose earlier
layers are rounded already. Nothing has to be swapped in between, and the samples are run once for as many layers as have room for
their moments; once for all where batches run in step (`surgery.lending`), as each layer's are complete before the next one's begin.

Memory: `MOMENTS_BYTES` of moments, or those of one layer where they are more, whatever the number of layers and samples. In step:
those of one layer.

Shape alphabet: T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_balance import Balance
from mmcompress.passes.quantize_calibrate import readers_of_one_input, watch
from mmcompress.surgery.watch import MOMENTS_BYTES, Sums
from mmcompress.views import Tower


@dataclass(frozen=True)
class Inputs:
    """What is known of the input that some Linears share."""

    moment: Tensor
    """E[x x'] (C, C)."""
    mean: Tensor
    """E[x] (C,)."""
    mean_sizes: Tensor | None
    """E|x| (C,), where it was asked for."""


def inputs_of(
    bundle: Bundle,
    tower: Tower,
    linears: Mapping[str, nn.Linear],
    context: Context,
    balance: Balance,
    sizes: bool,
    what: str,
    use: Callable[[list[str], Inputs], None],
    hint: str = "",
) -> None:
    """Call `use` with Linears that share an input, and what is known of it, `sizes` too; not with those that are never called.

    Raises UsageError without data for this tower, saying that `what` needs it, and with `hint` what else there is.
    """
    for part in runs(bundle, tower, linears):
        moments = {group[0]: Sums(full=True) for group in part}
        means = {group[0]: Sums(full=False) for group in part} if sizes else {}
        watched = {path: linears[path] for path in moments}

        def record(
            path: str, tokens: Tensor, moments: dict[str, Sums] = moments, means: dict[str, Sums] = means
        ) -> None:
            counts = balance.counts(path, tokens)
            moments[path].add(tokens, counts)
            if path in means:
                means[path].add(tokens.abs(), counts)

        def complete(
            path: str,
            moments: dict[str, Sums] = moments,
            means: dict[str, Sums] = means,
            part: Sequence[list[str]] = part,
        ) -> None:
            found = moments.pop(path)
            if found.second is not None:  # else read by its owner without being called
                group = next(group for group in part if group[0] == path)
                use(group, Inputs(found.second_moment(), found.mean(), means.pop(path).mean() if sizes else None))

        watch(bundle, tower, watched, record, context, "moments", what, balance.begin, complete, hint)


def runs(bundle: Bundle, tower: Tower, linears: Mapping[str, nn.Linear]) -> list[list[list[str]]]:
    """Return which Linears to watch in each run of the samples, those of one input together: all, or as many as have room."""
    parts: list[list[list[str]]] = []
    room = 0
    groups = readers_of_one_input(tower, list(linears))
    if bundle.in_step and groups:
        return [groups]
    for group in groups:
        needed = 4 * linears[group[0]].in_features ** 2
        if needed > room:
            parts.append([])
            room = MOMENTS_BYTES
        parts[-1].append(group)
        room -= needed
    return parts


def linears_of(bundle: Bundle, paths: Sequence[str]) -> dict[str, nn.Linear]:
    """Return those of `paths` that are Linears."""
    return {path: module for path in paths if isinstance(module := bundle.module(path), nn.Linear)}
