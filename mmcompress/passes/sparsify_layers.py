"""Which layers `sparsify` works on, and how many of a model's weights are 0."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Json
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.kept_zeros import zeros_of
from mmcompress.views import Tower


def paths_of_blocks(tower: Tower) -> list[str]:
    """Return the paths of the layers that attentions and MLPs of a tower multiply by."""
    parts = [part for block in tower.blocks for part in (block.attention, block.cross, block.mlp) if part]
    return list(dict.fromkeys(path for part in parts for path in (*part.writers, part.reader)))


def named(paths: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return those of `paths` that one of `patterns` matches; all where there are none."""
    return [path for path in paths if not patterns or any(fnmatch.fnmatchcase(path, each) for each in patterns)]


def linears_of_blocks(bundle: Bundle, tower: Tower, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the Linears of a tower's blocks that `patterns` match, by path. Raises UsageError where one is quantized."""
    found = {}
    for path in named(paths_of_blocks(tower), patterns):
        module = bundle.module(path)
        if not isinstance(module, nn.Linear) or is_float_coded(module):
            raise UsageError(
                f"{path} is a {type(module).__name__}; sparsify works on nn.Linear", hint="put sparsify before quantize"
            )
        found[path] = module
    return found


def recount(bundle: Bundle, tower: Tower) -> dict[str, Json]:
    """Return how many weights of the blocks' Linears are 0, of how many, and as shares of these and of all the tower's numbers."""
    zeros = weights = 0
    for path in paths_of_blocks(tower):
        found = zeros_of(bundle.module(path))
        if found is not None:
            zeros, weights = zeros + int(found.sum()), weights + found.numel()
    parameters = sum(value.numel() for name, value in bundle.model.named_parameters() if tower.owns(name))
    return {
        "zeros": zeros,
        "weights": weights,
        "share": round(zeros / max(1, weights), 6),
        "share_of_tower": round(zeros / max(1, parameters), 6),
    }
