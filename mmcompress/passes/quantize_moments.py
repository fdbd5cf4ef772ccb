"""GPTQ over a tower: second moments of the layers' inputs from calibration samples, and the codes rounded with them.

Deliberate difference from the paper: every layer's inputs are those of the float model, not of one whose earlier layers are rounded
already. Nothing has to be swapped in between, and the samples are run once for as many layers as have room for their moments.

Memory: `MOMENTS_BYTES` of moments, or those of one layer where they are more, whatever the number of layers and samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.gptq import Compensation, compensation, gptq
from mmcompress.ops.half_quadratic import half_quadratic_grid
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_calibrate import readers_of_one_input, watch
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized_base import chunks
from mmcompress.surgery.watch import Sums
from mmcompress.views import Tower

MOMENTS_BYTES = 2**29


def rounded(
    bundle: Bundle, tower: Tower, sizes: Mapping[str, int], context: Context
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (path, the buffers of its `PackedLinear`) of the Linears in `sizes` that are called, each in groups of its size.

    Raises UsageError without data for this tower.
    """
    linears = {path: module for path in sizes if isinstance(module := bundle.module(path), nn.Linear)}
    for part in runs(tower, linears):
        sums = {group[0]: Sums(full=True) for group in part}
        watched = {path: linears[path] for path in sums}

        def record(path: str, tokens: Tensor, sums: dict[str, Sums] = sums) -> None:
            sums[path].add(tokens)

        watch(bundle, tower, watched, record, context, "moments", "rounding the weights by gptq")
        for first, *others in part:
            found = sums.pop(first)
            if found.second is None:
                continue  # read by its owner without being called
            how = compensation(found.second_moment())
            for path in (first, *others):
                yield path, _buffers(linears[path], how, sizes[path])


def looks(bundle: Bundle, tower: Tower, sizes: Mapping[str, int]) -> int:
    """Return how often the samples are run."""
    return len(runs(tower, {path: bundle.module(path) for path in sizes}))  # type: ignore[misc]


def runs(tower: Tower, linears: Mapping[str, nn.Linear]) -> list[list[list[str]]]:
    """Return which Linears to watch in each run of the samples, those of one input together: all, or as many as have room."""
    parts: list[list[list[str]]] = []
    room = 0
    for group in readers_of_one_input(tower, list(linears)):
        needed = 4 * linears[group[0]].in_features ** 2
        if needed > room:
            parts.append([])
            room = MOMENTS_BYTES
        parts[-1].append(group)
        room -= needed
    return parts


def _buffers(linear: nn.Linear, how: Compensation, size: int) -> dict[str, Tensor]:
    made = PackedLinear(linear, size)
    weight = linear.weight.detach()
    for rows in chunks(weight):
        made.set_rows(rows, gptq(weight[rows], how, *half_quadratic_grid(weight[rows], size)))
    return dict(made.named_buffers())
