"""Which gains of quantized layers go into what makes their inputs: a norm, the values' Linear, or the linear half of a gated MLP.

Into a Linear where what lies between is linear in its rows (`quantize_channels`); rows have scales of their own, so that what
rounding does to them does not change. Into a norm where all that read it have one gain, and nothing else does; only norms inside a
block, before layers of that block: what lies elsewhere may belong to another tower, or be given out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Plan
from mmcompress.passes.quantize_channels import channels_of, maker_of
from mmcompress.passes.quantize_moments import linears_of
from mmcompress.surgery.folding import can_fold, may_fold, watch_readers
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Tower


def add_folds(bundle: Bundle, tower: Tower, made: Plan) -> None:
    """Add to `made` maker -> the layers whose gains it takes over, of the layers that stay quantized, and what it is multiplied by.

    Takes one run of the tower's example inputs, where there is a gain at all.
    """
    gains = {
        path: made.tensors[f"{path}.gain"]
        for path in made.decisions["layers"]
        if tower.owns(path) and f"{path}.gain" in made.tensors
    }
    for reader, channels in channels_of(tower).items():
        path = maker_of(bundle, channels)
        maker = bundle.module(path)
        if reader in gains and isinstance(maker, nn.Linear):
            made.decisions["folds"][path] = [reader]
            made.tensors[f"{path}.fold"] = channels.factors(gains.pop(reader), maker.out_features)
    for norm, readers in _norms(bundle, tower, gains).items():
        made.decisions["folds"][norm] = readers
        made.tensors[f"{norm}.fold"] = gains[readers[0]]


def _norms(bundle: Bundle, tower: Tower, gains: dict[str, Tensor]) -> dict[str, list[str]]:
    """Return norm -> the layers that read it, where they have one gain and nothing else reads it."""
    gains = {path: gain for path, gain in gains.items() if _block_of(tower, path)}
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
        and can_fold(bundle.layer(norm))
    }


def _same(paths: set[str], gains: dict[str, Tensor]) -> bool:
    """Whether all of `paths` have one and the same gain."""
    found = [gains.get(path) for path in paths]
    return all(gain is not None and found[0] is not None and torch.equal(gain, found[0]) for gain in found)


def _block_of(tower: Tower, path: str) -> str:
    return next((block.path for block in tower.blocks if path.startswith(block.path + ".")), "")
