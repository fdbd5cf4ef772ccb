"""Models that are given fewer layers of a video: stored, trained, with other passes, exported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mmcompress import checkpoint
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.answerer import artifact_answerer, bundle_answerer
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.surgery.frames import merging_of, stages_of
from tests import tiny
from tests.passes.filming import (
    IMAGES,
    QWEN,
    SETTINGS,
    embedded,
    every_case,
    every_model,
    fewer,
    film,
    run,
    samples,
)


@every_case
def test_reload_and_copy_are_bit_equal(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    bundle = fewer(name, trained=True, **settings)
    written = checkpoint.save(bundle, tmp_path / "out")
    assert not written.plain_transformers
    for again in (checkpoint.load(tmp_path / "out"), copy.deepcopy(bundle)):
        assert merging_of(again.module("model")) == merging_of(bundle.module("model"))
        assert torch.equal(embedded(again, *samples()), embedded(bundle, *samples()))
        assert again.generate(samples()) == bundle.generate(samples())
    checkpoint.save(checkpoint.load(tmp_path / "out"), tmp_path / "again")
    for file in ("model.safetensors", "config.json", "mmc.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@every_model
def test_only_the_convolution_adds_weights(name: str) -> None:
    before = tiny.bundle(name).model.state_dict().keys()
    assert fewer(name, stride=4).model.state_dict().keys() == before
    bundle = fewer(name, stride=4, convolution=True)
    added = bundle.model.state_dict().keys() - before
    levels = 2 if name == "qwen3_vl" else 1
    assert len(added) == 2 * (2 + 2 * levels)
    language = bundle.tower("language")
    assert all(language.owns(key) and not bundle.tower("vision").owns(key) for key in added)
    facts = build("merge-frames", {"stride": 4, "convolution": True}).fit(bundle, Context())
    assert facts["parameters_added"] == 2 * levels * (32 * 3 + 32 + 32 * 32 + 32)


@every_model
def test_gradients_reach_the_stages(name: str) -> None:
    bundle = fewer(name, trained=True, stride=4, convolution=True)
    bundle.encode("language", bundle.prepare("language", samples()[:1])).sum().backward()
    stages = stages_of(bundle.module("model"))
    assert len(stages) == 2
    for parameter in (parameter for stage in stages for parameter in stage.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@every_model
def test_distill_trains_the_stages(name: str) -> None:
    """By what the teacher answers, who sees all layers; nothing else of the language model needs to."""
    bundle = fewer(name, stride=2, convolution=True)
    before = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    films = [film(IMAGES[place:] + IMAGES[:place]) for place in range(8)]
    data = Dataset(Memory([replace(one, key=str(place)) for place, one in enumerate(films)]), "films")
    context = Context(data=data, seed=0, teacher=lambda: tiny.bundle(name))
    params = {"steps": 6, "batch_size": 4, "towers": ["language"], "train": "projection", "learning_rate": 1e-3}
    run(bundle, ("distill", params), context=context)
    changed = {key for key, value in bundle.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed >= {key for key in before if ".frame_stages." in key and ".mixes." in key}
    assert all(".frame_stages." in key or key == "lm_head.weight" for key in changed)
    facts = bundle.history[-1].facts
    assert facts["loss"]["after"] < facts["loss"]["before"]


@every_model
@pytest.mark.parametrize(
    "step",
    [
        ("drop-visual-tokens", {"keep": 0.5, "after": (1,)}),
        ("quantize", {"scheme": "W8A16"}),
        ("quantize", {"scheme": "W8A8", "target": "cpu"}),
    ],
    ids=["drop", "w8a16", "w8a8"],
)
@pytest.mark.parametrize("convolution", [False, True])
def test_it_combines(name: str, step: tuple[str, dict[str, Any]], convolution: bool, tmp_path: Path) -> None:
    merging = ("merge-frames", {"stride": 2, "convolution": convolution})
    data = Context(data=tiny.data(name, 8), num_samples=8, batch_size=4, seed=0)
    bundle = run(tiny.bundle(name), merging, step, context=data)
    several = samples()
    answers = bundle.generate(several)
    checkpoint.save(bundle, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").generate(several) == answers
    if step[0] == "drop-visual-tokens":
        assert answers == [bundle.generate([sample])[0] for sample in several]
        turned = run(tiny.bundle(name), step, merging, context=data)
        assert turned.generate(several) == answers


def resized() -> list[Sample]:
    """As exported models see them: 224 x 224 pixels, 64 tokens a layer, of 256 that the tiny models take."""
    big = [image.resize((224, 224)) for image in IMAGES]
    return [
        film(big[:5], 1.0),
        Sample("none", question="how many ?"),
        replace(film(big[5:8], 0.5), key="both", picture=big[8], question="what ?"),
        Sample("two", picture=big[2], further=(big[3],), question="two of the small trees ?"),
    ]


@every_case
def test_the_parts_answer_as_the_whole(name: str, settings: dict[str, Any]) -> None:
    bundle = fewer(name, trained=True, **settings)
    want = bundle.generate(resized())
    assert len(set(want)) > 1
    assert bundle_answerer(bundle, threads=1).generate(resized()) == want


@pytest.mark.parametrize(
    ("name", "settings"), [(name, SETTINGS[1]) for name in QWEN] + [("qwen2_vl", own) for own in SETTINGS], ids=str
)
def test_exported_it_answers_the_same(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    bundle = fewer(name, trained=True, **settings)
    want = bundle.generate(resized())
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    operators = {node.op_type for node in onnx.load(artifact.path("frames"), load_external_data=False).graph.node}
    assert not operators & {"ScatterElements", "ScatterND", "Loop", "NonZero", "GatherND", "If"}
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner, threads=1)
        assert answerer.generate(resized()) == want
        assert [answerer.generate([sample])[0] for sample in resized()] == want
        answerer.close()


@pytest.mark.parametrize(
    "step",
    [("drop-visual-tokens", {"keep": 0.5, "after": (1,)}), ("quantize", {"scheme": "W8A16"})],
    ids=["drop", "w8a16"],
)
def test_exported_with_another_pass_it_answers_the_same(step: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Untrained stages too, whose equal zeros a graph holds once."""
    bundle = run(tiny.bundle("qwen3_vl"), ("merge-frames", {"stride": 4, "convolution": True}), step)
    want = bundle.generate(resized())
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner, threads=1)
        assert answerer.generate(resized()) == want
        answerer.close()
