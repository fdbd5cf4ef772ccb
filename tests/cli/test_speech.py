"""The commands on a model that answers in text: what it is measured by, what it is refused, and what the reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcompress import checkpoint
from mmcompress.recipe import parse
from tests import tiny
from tests.cli.conftest import Mmc

soundfile = pytest.importorskip("soundfile", reason="pip install 'mmcompress[audio]'")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "whisper"
    checkpoint.save(tiny.bundle("whisper"), directory)
    (directory / "mmc.json").unlink()
    return directory


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speech")
    lines = []
    for sample in tiny.spoken(6):
        assert sample.audio is not None
        soundfile.write(directory / f"{sample.key}.wav", sample.waveform(tiny.RATE), tiny.RATE)
        lines.append(json.dumps({"file_name": f"{sample.key}.wav", "text": sample.texts[0]}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_eval_measures_word_accuracy_and_says_the_error_rate(mmc: Mmc, whisper: Path, speech: Path) -> None:
    done = mmc("eval", whisper, "--data", speech, "--baseline", whisper)
    assert done.code == 0, done.err
    assert "word_accuracy" in done.out
    assert "identical" in done.out
    assert "word error rate" in done.out
    assert "perplexity of the right answers" in done.out
    assert "controls: what is scored without looking" in done.out
    document = mmc("eval", whisper, "--data", speech, "--language", "German", "--json").document
    assert document["config"]["tasks"] == ["transcription", "perplexity"]
    assert document["config"]["wording"] == "whisper de"
    assert document["controls"][0]["control"] == "silence"
    row = document["results"]["transcription"]["word_accuracy"]
    assert row["n"] == 6
    assert row["value"] <= 1


def test_a_task_of_embeddings_is_refused_with_those_there_are(mmc: Mmc, whisper: Path, speech: Path) -> None:
    done = mmc("eval", whisper, "--data", speech, "--task", "retrieval")
    assert done.code == 2
    assert "retrieval needs embeddings, and this model gives answers" in done.err
    assert "its tasks are transcription, vqa, captioning, perplexity, answer-agreement" in done.err


def test_pruning_is_judged_by_word_accuracy(mmc: Mmc, whisper: Path, speech: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = mmc("prune", whisper, "-o", out, "--ratio", 0.3, "--data", speech, "--eval-data", speech, "--json")
    assert done.code == 0, done.err
    stages = done.document["stages"]
    assert set(stages[0]["metrics"]) == {"transcription.word_accuracy"}
    assert "answer-agreement.identical" in stages[1]["metrics"]
    told = " ".join(finding["text"] for finding in done.document["verdict"])
    assert "random selection at the same ratio: transcription word_accuracy" in told
    assert "gives the same answer as the original: share" in told
    assert "word error rate" in told
    assert parse(json.loads((out / "mmc.json").read_text())["recipe"]).tasks == ("transcription",)
    assert mmc("check", out, "--baseline", out).code == 0
    page = tmp_path / "report.html"
    assert mmc("report", out, "-o", page).code == 0
    assert "transcription.word_accuracy" in page.read_text().replace("<wbr>", "")
    assert mmc("prune", whisper, "-o", tmp_path / "b", "--ratio", 0.3, "--dry-run", "--eval-data", speech).code == 0


def test_what_was_made_layer_by_layer_goes_on_to_export(mmc: Mmc, whisper: Path, tmp_path: Path) -> None:
    done = mmc("quantize", whisper, "-o", tmp_path / "out", "--scheme", "W8A16")
    assert done.code == 0, done.err
    assert "next: mmc export" in done.err


def test_compress_refuses_a_task_before_it_computes(mmc: Mmc, whisper: Path, speech: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"steps: [{{prune: {{ratio: 0.3}}}}]\ntasks: [zero-shot]\ndata: {{calibration: {speech}, evaluation: {speech}}}\n"
    )
    for more in ((), ("--dry-run",)):
        done = mmc("compress", whisper, recipe, "-o", tmp_path / "out", *more)
        assert done.code == 2
        assert "zero-shot needs embeddings, and this model gives answers" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_task_of_lm_eval_is_asked_for_alone_and_of_a_model_that_answers(
    mmc: Mmc, whisper: Path, speech: Path, saved: Path
) -> None:
    done = mmc("eval", whisper, "--task", "lm-eval:mmmu_val", "--task", "perplexity", "--data", speech)
    assert done.code == 2
    assert "lm-eval:mmmu_val is asked for together with other tasks" in done.err
    done = mmc("eval", whisper)
    assert done.code == 2
    assert "there is nothing to evaluate on" in done.err
    done = mmc("eval", saved, "--task", "lm-eval:mmmu_val")
    assert done.code == 2
    assert "lm-eval:mmmu_val needs answers, and this model gives embeddings" in done.err


def test_a_pruned_model_learns_from_the_original(mmc: Mmc, whisper: Path, speech: Path, tmp_path: Path) -> None:
    pruned, taught = tmp_path / "pruned", tmp_path / "taught"
    assert mmc("prune", whisper, "-o", pruned, "--ratio", "0.2", "--data", speech).code == 0
    given = ("--teacher", whisper, "--data", speech, "--eval-data", speech, "--steps", "2", "--learning-rate", "1e-3")
    done = mmc("distill", pruned, "-o", taught, *given, "--cross-entropy", "0.5", "--json")
    assert done.code == 0, done.err
    assert "transcription.word_accuracy" in done.document["stages"][-1]["metrics"]
    record = json.loads((taught / "mmc.json").read_text())["records"][-1]
    assert record["facts"]["towers"] == ["audio", "decoder"]
    assert record["facts"]["loss"]["after"] < record["facts"]["loss"]["before"]
    done = mmc("report", taught, "-o", tmp_path / "report.html")
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    assert "Answers that changed" in page or "are those of the original, letter by letter" in page
    assert "Controls: what is scored without looking" in page
