"""The passes, by name. One file and one line here add a pass; the contract tests then cover it.

The values are import paths, so that reading this table (for `--help`, for recipes) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmcompress.errors import UsageError, closest
from mmcompress.passes.schema import Schema, read_schema

if TYPE_CHECKING:
    from mmcompress.passes.base import Pass

PASSES: dict[str, str] = {
    "prune": "mmcompress.passes.prune:Prune",
    "search-prune": "mmcompress.passes.search_prune:SearchPrune",
    "trim-vocabulary": "mmcompress.passes.trim_vocabulary:TrimVocabulary",
    "factorize": "mmcompress.passes.factorize:Factorize",
    "narrow": "mmcompress.passes.narrow:Narrow",
    "rotate": "mmcompress.passes.rotate:Rotate",
    "sparsify": "mmcompress.passes.sparsify:Sparsify",
    "merge-tokens": "mmcompress.passes.merge_tokens:MergeTokens",
    "coarsen-tokens": "mmcompress.passes.coarsen_tokens:CoarsenTokens",
    "reduce-visual-tokens": "mmcompress.passes.reduce_visual_tokens:ReduceVisualTokens",
    "drop-visual-tokens": "mmcompress.passes.drop_visual_tokens:DropVisualTokens",
    "merge-frames": "mmcompress.passes.merge_frames:MergeFrames",
    "quantize": "mmcompress.passes.quantize:Quantize",
    "distill": "mmcompress.passes.distill:Distill",
}

PREPARING = ("reduce-visual-tokens", "drop-visual-tokens", "merge-frames")
"""Those that change what a model is given and not only what it computes: an exported model's inputs are prepared after them."""


def _target(name: str) -> tuple[str, str]:
    name = name.replace("_", "-")
    if name not in PASSES:
        raise UsageError(f"there is no pass '{name}'", hint=closest(name, PASSES))
    module, _, cls = PASSES[name].partition(":")
    return module, cls


def schema(name: str) -> Schema:
    """Return a pass's parameters without importing it. Raises UsageError for an unknown name."""
    return read_schema(*_target(name))


def build(name: str, params: dict[str, Any]) -> Pass:
    """Return the pass `name` with `params` checked against its schema. Raises UsageError naming the closest key."""
    module, cls = _target(name)
    checked = schema(name).coerce(params, where=name.replace("_", "-"))
    made: Pass = getattr(importlib.import_module(module), cls)(**checked)
    return made
