"""Passes in any order: the sensible ones run, reload and export; the senseless ones are refused, with the reason and what to do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from tests import tiny

STEPS: dict[str, Step] = {
    "prune": Step("prune", {"ratio": 0.1}),
    "search": Step("search-prune", {"ratio": 0.1, "steps": 2, "batch_size": 4, "multiple": 1}),
    "merge": Step("merge-tokens", {"keep": 0.7}),
    "quantize": Step("quantize", {"scheme": "W8A8", "min_cosine": -1.0}),
    "distill": Step("distill", {"steps": 2, "batch_size": 4}),
    "blocks": Step("prune", {"ratio": 0.2, "units": ["blocks"], "score": "block-influence", "compensate": "none"}),
}
SENSELESS = {
    ("quantize", "prune"): "put prune before quantize",
    ("quantize", "search"): "put prune before quantize",
    ("quantize", "blocks"): "put prune before quantize",
    ("merge", "blocks"): "put prune before merge-tokens",
}
"""What may not come before what, and the hint."""
ORDERS = [
    order
    for chosen in (("prune", "merge", "quantize", "distill"), ("search", "merge", "quantize"), ("blocks", "merge", "quantize"))
    for order in itertools.permutations(chosen)
]  # fmt: skip


def refusals(order: tuple[str, ...]) -> list[str]:
    """Return the hints of the first step that cannot follow what came before it; none where all can."""
    for place, later in enumerate(order):
        found = [SENSELESS[earlier, later] for earlier in order[:place] if (earlier, later) in SENSELESS]
        if found:
            return found
    return []


def run(family: str, order: tuple[str, ...]) -> Bundle:
    bundle = tiny.bundle(family)
    context = Context(data=tiny.data(family, 12), num_samples=8, batch_size=4, teacher=lambda: tiny.bundle(family))
    for number, name in enumerate(order, 1):
        step = STEPS[name]
        pipeline.run_stage(bundle, pipeline.Stage(number, step, passes.build(step.name, step.params)), context)
    return bundle


@pytest.mark.parametrize("order", ORDERS, ids="+".join)
def test_sensible_orders_run_and_others_say_why_not(order: tuple[str, ...], tmp_path: Path) -> None:
    hints = refusals(order)
    if hints:
        with pytest.raises(UsageError) as refused:
            run("clip", order)
        assert any(hint in (refused.value.hint or "") for hint in hints)
        return
    bundle = run("clip", order)
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    for tower in bundle.towers():
        inputs = bundle.example_inputs(tower.name, 2)
        assert torch.equal(bundle.encode(tower.name, inputs), again.encode(tower.name, inputs))


def test_what_comes_out_exports(tmp_path: Path) -> None:
    bundle = run("clip", ("search", "merge", "distill", "quantize"))
    export_onnx(bundle, tmp_path / "artifact", batches=(1, 2))  # which compares both at each corner
    assert open_artifact(tmp_path / "artifact").path("vision").exists()
