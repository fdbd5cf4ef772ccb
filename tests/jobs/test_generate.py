"""`mmc generate`: the same answers from a checkpoint and from its export, what they took, and what it cannot do."""

from __future__ import annotations

import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.cli import __main__ as cli
from mmcompress.data import Dataset, Memory, Sample, Video, Waveform, open_data
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.embedders import evaluate_target
from mmcompress.jobs.generate import generate, samples_of
from tests import tiny


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny Whisper as a checkpoint and exported, and three recordings with their texts."""
    home = tmp_path_factory.mktemp("generate")
    made = tiny.bundle("whisper")
    checkpoint.save(made, home / "whisper")
    export_onnx(made, home / "whisper-onnx", batches=(1,))
    (home / "speech").mkdir()
    rows = []
    for sample in tiny.spoken(3):
        name = f"{sample.key}.wav"
        with wave.open(str(home / "speech" / name), "wb") as file:
            file.setparams((1, 2, tiny.RATE, 0, "NONE", ""))
            file.writeframes((sample.waveform(tiny.RATE) * 32767).astype(np.int16).tobytes())
        rows.append(json.dumps({"file_name": name, "text": sample.texts[0]}))
    (home / "speech" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return {"checkpoint": home / "whisper", "exported": home / "whisper-onnx", "speech": home / "speech"}


def test_a_checkpoint_and_its_export_answer_the_same(places: dict[str, Path]) -> None:
    samples = samples_of(sorted(places["speech"].glob("*.wav")), [], "")
    want = checkpoint.load(places["checkpoint"]).generate(samples)
    assert len(set(want)) > 1
    for model, runner in (("checkpoint", None), ("exported", None), ("exported", "openvino")):
        made = generate(places[model], samples, runner=runner, batch=2, threads=1)
        assert list(made.answers) == want
        assert made.tokens == (12, 12, 12)
        assert [Path(name).name for name in made.inputs] == ["0000.wav", "0001.wav", "0002.wav"]
        timing = made.timing()
        assert timing["first_token_ms"] >= timing["audio_ms"] > 0
        assert timing["tokens_per_second"] > 0


def test_a_long_recording_is_cut_alike_for_a_checkpoint_and_its_export(places: dict[str, Path]) -> None:
    """Four windows, two at a time; a recording that needs none of them keeps its answer."""
    wave_ = np.concatenate([one.samples for one in tiny.recordings(4, seed=3)])
    samples = [Sample("long", audio=Waveform(wave_, tiny.RATE)), next(iter(tiny.spoken(1)))]
    bundle = checkpoint.load(places["checkpoint"])
    pieces = len(bundle.family.pieces(bundle.processor, samples[0]))
    assert pieces >= 3
    want = bundle.generate(samples)
    for model in ("checkpoint", "exported"):
        made = generate(places[model], samples, batch=2, threads=1)
        assert list(made.answers) == want
        assert made.tokens == (12 * pieces, 12)
    assert evaluate_target(
        places["exported"],
        dataset=Dataset(Memory([replace(samples[0], texts=("a red cat",))])),
        tasks=["transcription"],
    ).scene.answers.texts == (want[0],)


def test_what_no_graph_takes_the_checkpoint_answers_itself_and_other_errors_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny.bundle("llava_clip")
    bundle.model.generation_config.repetition_penalty = 1.5
    checkpoint.save(bundle, tmp_path / "model")
    asked = list(tiny.data("llava_clip", 2))
    made = generate(tmp_path / "model", asked, threads=1)
    assert (list(made.answers), made.tokens) == (bundle.generate(asked), ())
    monkeypatch.setattr(Bundle, "generate", lambda *_: pytest.fail("tried a second way"))
    checkpoint.save(tiny.bundle("llava_clip"), tmp_path / "other")
    with pytest.raises(UsageError, match="takes 256"):
        generate(tmp_path / "other", [Sample("long", question="what " * 300)], threads=1)


def test_the_command_prints_one_line_a_file(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [word for path in sorted(places["speech"].glob("*.wav")) for word in ("--audio", str(path))]
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", str(places["exported"]), *files, "--max-new-tokens", "3", "--threads", "1"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert [len(line.split()) for line in out.splitlines()] == [3, 3, 3]
    assert "tokens/s" in err
    with pytest.raises(SystemExit):
        cli.main(["generate", str(places["exported"]), *files, "--max-new-tokens", "3", "--threads", "1", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in document["answers"]] == out.splitlines()
    assert [row["tokens"] for row in document["answers"]] == [3, 3, 3]
    assert set(document["timing"]) == {
        "prepare_ms", "audio_ms", "prompt_ms", "first_token_ms", "token_ms", "tokens_per_second", "cache_bytes",
    }  # fmt: skip


def test_an_exported_model_is_evaluated_like_its_checkpoint(places: dict[str, Path]) -> None:
    dataset = open_data(str(places["speech"]))
    want, got = (
        evaluate_target(places[name], dataset=dataset, tasks=["transcription"]).to_json()["results"]
        for name in ("checkpoint", "exported")
    )
    assert got == want


def test_pictures_are_asked_about_together_and_frames_as_a_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny.bundle("qwen2_5_vl")
    checkpoint.save(bundle, tmp_path / "model")
    (tmp_path / "clip").mkdir()
    pictures = tiny.images(3)
    for number, image in enumerate(pictures):
        image.save(tmp_path / "clip" / f"{number}.png")
    files = [tmp_path / "clip" / f"{number}.png" for number in (2, 0)]
    words = ["generate", str(tmp_path / "model"), "--prompt", "what ?"]
    words += [word for path in files for word in ("--image", str(path))]
    words += ["--frames", str(tmp_path / "clip"), "--fps", "1"]
    said = []
    for more in ([], ["--together"]):
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, *more])
        assert caught.value.code == 0
        said.append(capsys.readouterr().out.splitlines())
    asked = Sample("", question="what ?")
    video = asked.showing((), Video(tuple(pictures), 1.0))
    assert said[0] == bundle.generate([asked.showing([pictures[2]]), asked.showing([pictures[0]]), video])
    assert said[1] == bundle.generate([asked.showing([pictures[2], pictures[0]]), video])


def test_what_it_cannot_do(places: dict[str, Path], tmp_path: Path) -> None:
    (recording, *_) = sorted(places["speech"].glob("*.wav"))
    with pytest.raises(UsageError, match="nothing to answer"):
        samples_of([], [], "")
    with pytest.raises(UsageError, match="no file at"):
        samples_of([tmp_path / "absent.wav"], [], "")
    with pytest.raises(UsageError, match="is a checkpoint, which only torch runs") as caught:
        generate(places["checkpoint"], samples_of([recording], [], ""), runner="onnxruntime")
    assert "mmc export" in caught.value.hint
    with pytest.raises(UsageError, match="has no audio"):
        generate(places["exported"], samples_of([], [], "what is it ?"))
    checkpoint.save(tiny.bundle("clip"), tmp_path / "clip")
    with pytest.raises(UsageError, match="clip models do not answer in text"):
        generate(tmp_path / "clip", samples_of([], [], "what is it ?"))
