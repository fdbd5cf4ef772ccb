"""The main job through the command line, on the real DINOv2-S + MiniLM and the held-out vendor's drawings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import VisionTextDualEncoderModel

from mmcompress import checkpoint
from mmcompress.cli.__main__ import main

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

# n = 300 drawings: a tenth of `bench.against_random`, enough for effects of ten points.
RECIPE = """
data: {calibration: demo:train, evaluation: demo:test, num_samples: 48, evaluation_samples: 300, batch_size: 32}
steps:
%s
"""


def mmc(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run `mmc … --json --quiet` in this process and return the document it prints; the exit code must be 0."""
    with pytest.raises(SystemExit) as ended:
        main([*(str(argument) for argument in arguments), "--json", "--quiet"])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    return json.loads(printed.out)


def compress(capsys: pytest.CaptureFixture[str], model: Path, folder: Path, *steps: str) -> dict[str, Any]:
    (folder / "recipe.yaml").write_text(RECIPE % "\n".join(f"  - {step}" for step in steps))
    document: dict[str, Any] = mmc(capsys, "compress", model, folder / "recipe.yaml", "-o", folder / "out")
    return document


def r1(document: dict[str, Any], stage: str) -> float:
    row = next(row for row in document["stages"] if row["stage"] == stage)
    return float(row["metrics"]["retrieval.image_to_text_r1"]["value"])


def test_the_model_is_worth_compressing(capsys: pytest.CaptureFixture[str], dual_encoder: Path) -> None:
    found = mmc(capsys, "eval", dual_encoder, "--data", "demo:test", "--num-samples", "300", "--task", "retrieval")
    assert found["results"]["retrieval"]["image_to_text_r1"]["low"] > 0.35


def test_int8_keeps_accuracy_and_quarters_the_size(
    capsys: pytest.CaptureFixture[str], dual_encoder: Path, tmp_path: Path
) -> None:
    document = compress(capsys, dual_encoder, tmp_path, "quantize: {scheme: W8A8}")
    assert r1(document, "quantize") > r1(document, "original") - 0.03
    before, after = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (dual_encoder, tmp_path / "out")
    )
    assert before / after > 3.7
    again = checkpoint.load(tmp_path / "out")
    assert any(tensor.dtype == torch.int8 for tensor in again.model.state_dict().values())
    exported = mmc(capsys, "export", tmp_path / "out", "-o", tmp_path / "onnx", "--to", "onnx")
    assert exported
    measured = mmc(
        capsys, "eval", tmp_path / "onnx", "--data", "demo:test", "--num-samples", "300", "--task", "retrieval",
        "--runner", "openvino",
    )  # fmt: skip
    assert measured["results"]["retrieval"]["image_to_text_r1"]["value"] > r1(document, "original") - 0.03


@pytest.mark.parametrize(
    ("step", "name"),
    [("prune: {ratio: 0.3}", "prune"), ("merge-tokens: {keep: 0.5}", "merge-tokens")],
)
def test_selection_beats_random(
    step: str, name: str, capsys: pytest.CaptureFixture[str], dual_encoder: Path, tmp_path: Path
) -> None:
    document = compress(capsys, dual_encoder, tmp_path, step)
    assert r1(document, name) > r1(document, f"{name} (random)")
    texts = [finding["text"] for finding in document["verdict"]]
    assert any(
        text.startswith(f"{name}: better than random selection") and "image_to_text_r1" in text for text in texts
    )


def test_plain_transformers_loads_a_uniform_cut_bit_equal(
    capsys: pytest.CaptureFixture[str], dual_encoder: Path, tmp_path: Path
) -> None:
    document = mmc(
        capsys, "prune", dual_encoder, "-o", tmp_path / "out", "--units", "blocks", "--score", "block-influence",
        "--ratio", "0.15", "--compensate", "none", "--data", "demo:train", "--num-samples", "32",
    )  # fmt: skip
    assert document["plain_transformers"], document["why"]
    plain = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out").eval()
    ours = checkpoint.load(tmp_path / "out")
    inputs = ours.example_inputs("vision", 2)
    with torch.no_grad():
        assert torch.equal(plain.get_image_features(**inputs).pooler_output, ours.encode("vision", inputs))
