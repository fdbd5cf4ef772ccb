"""Whisper tiny.en as it is deployed: the exported files say, word for word, what the checkpoint says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import assets
from mmcompress import checkpoint
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import evaluate
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.answerer import artifact_answerer
from tests.built import built

pytestmark = pytest.mark.real
COUNT = 56


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = checkpoint.load(built(assets.whisper_tiny))
    return export_onnx(bundle, tmp_path_factory.mktemp("whisper") / "out", batches=(1, 2)).artifact.directory


@pytest.mark.timeout(1200)
def test_exported_it_writes_what_torch_writes(exported: Path) -> None:
    from mmcompress.export.artifact import open_artifact

    dataset = open_data(str(built(assets.speech))).subset(COUNT, 0)
    samples = [dataset[index] for index in range(COUNT)]
    bundle = checkpoint.load(built(assets.whisper_tiny))
    want = [text for start in range(0, COUNT, 8) for text in bundle.generate(samples[start : start + 8])]
    artifact = open_artifact(exported)
    assert artifact.component("decoder").bytes < 1.05 * 4 * 29_600_000  # the word table once, not once for each end
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner)
        got = [text for start in range(0, COUNT, 7) for text in answerer.generate(samples[start : start + 7])]
        assert got == want
        answerer.close()
    answerer = artifact_answerer(artifact)
    found = evaluate(answerer, dataset.subset(24, 0), ["transcription"], batch=8).estimates["transcription"]
    # The voice is clear: far more wrong words mean that something other than the voice is broken.
    assert found["word_accuracy"].value > 0.8
