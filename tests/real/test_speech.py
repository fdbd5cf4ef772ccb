"""Whisper tiny.en as it is deployed: the exported files say, word for word, what the checkpoint says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import assets
from mmcompress import checkpoint
from mmcompress.data import Dataset, Memory, Sample, Waveform, open_data
from mmcompress.evaluate.answers import RATE
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


def test_half_a_minute_is_no_limit() -> None:
    """Twelve sentences in a row, with short pauses: as few wrong words as in the sentences by themselves."""
    bundle = checkpoint.load(built(assets.whisper_tiny))
    sentences = list(open_data(str(built(assets.speech))).take(12))
    pause = np.zeros(RATE // 3, np.float32)
    wave = np.concatenate([part for sample in sentences for part in (sample.waveform(RATE), pause)])
    assert len(wave) > 40 * RATE
    long = Sample("long", (" ".join(sample.texts[0] for sample in sentences),), audio=Waveform(wave, RATE))
    alone, joined = (
        evaluate(bundle, Dataset(Memory(samples)), ["transcription"], batch=4).estimates["transcription"][
            "word_accuracy"
        ]
        for samples in (sentences, [long])
    )
    assert joined.value > alone.value - 0.04
