"""Videos, and tiny models that are given fewer of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from mmcompress import pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Sample, Video
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from mmcompress.surgery.frames import stages_of
from tests import tiny, tiny_vlm

QWEN = tuple(name for name in tiny_vlm.MODELS if name.startswith("qwen"))
IMAGES = tiny.images(9)
WIDE = [image.resize((112, 56)) for image in IMAGES[:3]]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"stride": 2},
    {"stride": 4, "convolution": True},
    {"stride": 2, "method": "first"},
    {"stride": 4, "method": "random"},
)
every_model = pytest.mark.parametrize("name", QWEN)
every_case = pytest.mark.parametrize(
    ("name", "settings"), [(name, settings) for name in QWEN for settings in SETTINGS], ids=str
)


def film(frames: Sequence[Image], rate: float = 2.0, **more: Any) -> Sample:
    return Sample("film", ("a red cat",), video=Video(tuple(frames), rate), question="what is this ?", **more)


def samples() -> list[Sample]:
    """Videos of five layers, of one and, wider, of two beside a picture; a picture; none; two pictures."""
    asked = Sample("", ("a red cat",), question="what is this ?")
    return [
        film(IMAGES, 1.0),
        replace(film(IMAGES[3:5]), key="still"),
        replace(film(WIDE), key="both", picture=IMAGES[4], texts=("two dogs on a big house",)),
        replace(asked, key="one", picture=IMAGES[1]),
        replace(asked, key="none"),
        replace(asked, key="two", picture=IMAGES[5], further=(IMAGES[6],)),
    ]


def run(bundle: Bundle, *steps: tuple[str, dict[str, Any]], context: Context | None = None) -> Bundle:
    for number, (name, params) in enumerate(steps, 1):
        stage = pipeline.Stage(number, Step(name, params), build(name, params))
        pipeline.run_stage(bundle, stage, context or Context(seed=5))
    return bundle


def fewer(name: str, trained: bool = False, **settings: Any) -> Bundle:
    """Return a tiny model with frames merged; `trained`: what its stages add is no longer nothing."""
    bundle = run(tiny.bundle(name), ("merge-frames", settings))
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for stage in stages_of(bundle.module("model")):
                for parameter in stage.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return bundle


def embedded(bundle: Bundle, *asked: Sample) -> Tensor:
    return torch.from_numpy(bundle.embed("language", list(asked)))


def layers_given(bundle: Bundle, sample: Sample) -> Tensor:
    """Return the tokens (M, N, C) that the language model is given of a video of 56 x 56 pixels, four a layer."""
    inputs = bundle.prepare("language", [sample])
    family: Any = bundle.family
    with torch.no_grad():
        given = family._given(bundle.model, inputs)["video"]
        deep = getattr(given, "deepstack_features", None) or []
        parts = [torch.cat(list(level)) for level in (given.pooler_output, *deep)]
    return torch.cat(parts, dim=-1).unflatten(0, (-1, 4))


def moving_positions(bundle: Bundle, sample: Sample) -> Tensor:
    """Return the positions (3, tokens) of a video."""
    inputs = bundle.prepare("language", [sample])
    return inputs["position_ids"][0][:, inputs["input_ids"][0] == bundle.model.config.video_token_id]
