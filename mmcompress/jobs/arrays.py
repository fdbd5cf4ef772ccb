"""Inputs for timings and memory: deterministic, of the right shapes, the same for everything that is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmcompress.export.artifact import TensorSpec
from mmcompress.measure.runner import Arrays

TOKENS = 16
"""Of a text: a caption, not the longest text a model takes."""


def arrays_for(
    specs: Sequence[TensorSpec], batch: int, tokens: int = TOKENS, sizes: Mapping[str, int] | None = None
) -> Arrays:
    """Return inputs (B, …) that fit `specs`: noise for floats, small ids and full masks for integers.

    `sizes` are those of named axes; one that is not named has `tokens`, or as "past_1" what "past" has. An axis may be a sum of
    others, "past + tokens".
    """
    generator = np.random.default_rng(0)
    known = {"batch": batch, **(sizes or {})}

    def size(name: str) -> int:
        return known.get(name, known.get(name.partition("_")[0], tokens))

    arrays = {}
    for spec in specs:
        shape = [dim if isinstance(dim, int) else sum(map(size, dim.split(" + "))) for dim in spec.dims]
        if "float" in spec.dtype:
            arrays[spec.name] = generator.standard_normal(shape).astype(np.float32)
        elif "mask" in spec.name:
            arrays[spec.name] = np.ones(shape, dtype=np.dtype(spec.dtype))
        elif "shape" in spec.name:
            patches = next(other.dims[1] for other in specs if "float" in other.dtype)
            arrays[spec.name] = np.full(shape, int(np.sqrt(int(patches))), dtype=np.dtype(spec.dtype))
        else:
            arrays[spec.name] = generator.integers(1, 4, shape).astype(np.dtype(spec.dtype))
    return arrays
