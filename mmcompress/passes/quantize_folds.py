"""Which gains of quantized layers go into the norm before them: those of all that read it, where nothing else does.

Only norms inside a block, before layers of that block: what lies elsewhere may belong to another tower, or be given out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Plan
from mmcompress.passes.quantize_moments import linears_of
from mmcompress.surgery.folding import can_fold, may_fold, watch_readers
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Tower


def folds_of(bundle: Bundle, tower: Tower, made: Plan) -> dict[str, list[str]]:
    """Return norm -> the layers whose gains it takes over, of the layers that stay quantized.

    Takes one run of the tower's example inputs, where there is a gain at all.
    """
    gains = {
        path: made.tensors[f"{path}.gain"]
        for path in made.decisions["layers"]
        if tower.owns(path) and f"{path}.gain" in made.tensors and _block_of(tower, path)
    }
    if not gains:
        return {}
    inside = [
        (path, module)
        for block in tower.blocks
        for path, module in bundle.module(block.path).named_modules(prefix=block.path)
    ]
    norms = {path: module for path, module in inside if may_fold(module)}
    linears = linears_of(bundle, [path for path, _ in inside])
    with evaluating(bundle.model), torch.inference_mode(), watch_readers(norms, linears) as readers:
        bundle.encode(tower.name, bundle.example_inputs(tower.name))
    return {
        norm: sorted(paths)
        for norm, paths in sorted(readers.alone().items())
        if {_block_of(tower, path) for path in paths} == {_block_of(tower, norm)}
        and _same(paths, gains)
        and can_fold(norms[norm])
    }


def _same(paths: set[str], gains: dict[str, Tensor]) -> bool:
    """Whether all of `paths` have one and the same gain."""
    found = [gains.get(path) for path in paths]
    return all(gain is not None and found[0] is not None and torch.equal(gain, found[0]) for gain in found)


def _block_of(tower: Tower, path: str) -> str:
    return next((block.path for block in tower.blocks if path.startswith(block.path + ".")), "")
