"""Vision-language models as they are deployed: the exported parts say, word for word, what the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import assets
from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.data import Sample, open_data
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.passes.base import Context
from tests import tiny
from tests.built import built

pytestmark = pytest.mark.real
COUNT = 50


def mini_vlm() -> tuple[Bundle, list[Sample]]:
    """The trained one, and held-out questions of every slice."""
    dataset = open_data(str(built(lambda: assets.vqa("heldout")))).subset(COUNT, 0)
    return checkpoint.load(built(assets.mini_vlm)), list(dataset)


def dropping_vlm() -> tuple[Bundle, list[Sample]]:
    """The same, a third of whose image tokens are left at the end of their way, chosen by the question."""
    bundle, samples = mini_vlm()
    made = passes.build("drop-visual-tokens", {"keep": 0.33, "method": "pyramiddrop"})
    plan = made.plan(bundle, Context())
    made.apply(bundle, plan)
    bundle.history.append(Record(made.name, {"keep": 0.33, "method": "pyramiddrop"}, plan.decisions))
    return bundle, samples


def tiny_qwen() -> tuple[Bundle, list[Sample]]:
    """Random weights; its parts know one size of picture."""
    samples = tiny.data("qwen2_5_vl", COUNT)
    sized = [each if each.picture is None else replace(each, picture=each.image.resize((224, 224))) for each in samples]
    return tiny.bundle("qwen2_5_vl"), sized


@pytest.mark.timeout(900)
@pytest.mark.parametrize("made", [mini_vlm, dropping_vlm, tiny_qwen])
def test_exported_it_writes_what_torch_writes(made: Callable[[], tuple[Bundle, list[Sample]]], tmp_path: Path) -> None:
    bundle, samples = made()
    want = [text for start in range(0, COUNT, 10) for text in bundle.generate(samples[start : start + 10])]
    assert len(set(want)) > 5  # a model that always says the same would prove nothing
    export_onnx(bundle, tmp_path / "out", batches=(1, 2))
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(open_artifact(tmp_path / "out"), runner)
        got = [text for start in range(0, COUNT, 9) for text in answerer.generate(samples[start : start + 9])]
        answerer.close()
        assert got == want
