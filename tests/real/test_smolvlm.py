"""SmolLM2-135M in a model of SmolVLM's shape: what int8 costs a real language model, and its export writes what torch writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import assets
from mmcompress import checkpoint
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.compress import compress
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.recipe import parse
from tests.built import built

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]
COUNT, ANSWERS = 24, 6


@pytest.fixture(scope="module")
def model() -> Path:
    return built(assets.smolvlm)


def judged(folder: Path, reference: Evaluation | None = None) -> Evaluation:
    data = open_data(str(built(lambda: assets.passages("test")))).subset(COUNT, 0)
    return evaluate(checkpoint.load(folder), data, ["perplexity"], batch=8, reference=reference)


def test_int8_costs_a_real_language_model_little(model: Path, tmp_path: Path) -> None:
    before = judged(model)
    found = before.estimates["perplexity"]["answer_log_likelihood"]
    # That of a model that knows nothing is ln 49,188 = 10.8; of one that knows how frequent words are about 7.
    assert found.value > -5
    data = {"calibration": str(built(lambda: assets.passages("calibration"))), "num_samples": 16, "batch_size": 8}
    step = {"quantize": {"scheme": "W8A8", "target": "openvino", "towers": ["language"], "sensitivity_samples": 0}}
    compress(model, parse({"steps": [step], "data": data}), tmp_path / "out")
    after = judged(tmp_path / "out", before)
    difference = after.differences["perplexity"]["answer_log_likelihood"]
    # Everything is rounded, the output layer too: more than a sixth more perplexity would be a broken grid, not rounding.
    assert difference.value > -0.15


def test_exported_it_writes_what_torch_writes(model: Path, tmp_path: Path) -> None:
    rows = list(open_data(str(built(lambda: assets.passages("asked")))))
    samples = [*rows[: ANSWERS // 2], *rows[-ANSWERS // 2 :]]  # about pictures, and texts alone
    assert {sample.picture is None for sample in samples} == {True, False}
    bundle = checkpoint.load(model)
    want = bundle.generate(samples)
    assert len(set(want)) == ANSWERS
    artifact = export_onnx(bundle, tmp_path / "onnx", batches=(1,)).artifact
    assert artifact.component("language").bytes < 1.02 * 4 * 134_538_048  # the output layer is the word table
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(open_artifact(tmp_path / "onnx"), runner)
        got = [text for start in range(0, ANSWERS, 4) for text in answerer.generate(samples[start : start + 4])]
        answerer.close()
        assert got == want
