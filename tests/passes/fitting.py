"""Weights rounded to samples, for tests: models whose channels differ, samples, and one run of the pass."""

from __future__ import annotations

from typing import Any

import torch

from mmcompress.bundle import Bundle
from mmcompress.manifest import Record
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from tests import tiny

FAMILY = "dual_encoder_dinov2"
VLM = "llava_siglip"


def context(family: str = FAMILY, count: int = 8) -> Context:
    return Context(data=tiny.data(family, count), num_samples=count, batch_size=4)


def run(bundle: Bundle, data: Context, **params: Any) -> tuple[Bundle, Plan]:
    made = Quantize(**{"scheme": "W4A16", "group_size": 16, "min_cosine": -1.0, "sensitivity_samples": 0, **params})
    made.check(bundle)
    plan = made.plan(bundle, data)
    made.apply(bundle, plan)
    bundle.history.append(Record("quantize", vars(made), plan.decisions, {}, 0.0))
    return bundle, plan


def spread(family: str = FAMILY) -> Bundle:
    """A model with channels of very different size behind its norms, as trained models have them."""
    bundle = tiny.bundle(family)
    with torch.no_grad():
        for tower in bundle.towers():
            for block in tower.blocks:
                for name, parameter in bundle.module(block.path).named_parameters():
                    if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
                        parameter[::7] *= 8
    return bundle
