"""Bad recordings, frames, chat templates and placeholders through the real entry: one line, a hint, exit code 2, nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmcompress import checkpoint
from mmcompress.export.onnx import export_onnx
from tests import tiny, tiny_vlm
from tests.cli.conftest import Mmc

soundfile = pytest.importorskip("soundfile", reason="pip install 'mmcompress[audio]'")
pytest.importorskip("soxr", reason="pip install 'mmcompress[audio]'")

ASKED = {"question": "what is this ?", "answers": ["a red cat"]}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Commands write to tmp_path/out; neither it nor anything hidden beside it may be there afterwards."""
    yield
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "."))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models that hear and that see, as checkpoints, and two of them exported."""
    directory = tmp_path_factory.mktemp("models")
    for name in ("whisper", "clap", "llava_clip", "qwen2_5_vl", "clip"):
        bundle = tiny.bundle(name)
        checkpoint.save(bundle, directory / name)
        (directory / name / "mmc.json").unlink()
        if name in ("whisper", "llava_clip"):
            export_onnx(bundle, directory / f"{name}-onnx", batches=(1,))
    return directory


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A data folder with four numbered frames and a picture beside them."""
    folder = tmp_path / "data"
    (folder / "clip").mkdir(parents=True)
    for number, image in enumerate(tiny.images(4), 1):
        image.save(folder / "clip" / f"{number}.png")
    tiny.images(1)[0].save(folder / "0.png")
    return folder


def rows(folder: Path, *found: dict[str, Any]) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(ASKED | row) for row in found))
    return folder


def refused(mmc: Mmc, said: str, *words: object) -> None:
    found = mmc(*words)
    assert found.code == 2, found.out
    assert said in found.error


def passes(model: Path, data: Path, out: Path, task: str, most: int = 2) -> list[tuple[object, ...]]:
    """The first `most` of four commands that look at the data."""
    every: list[tuple[object, ...]] = [
        ("eval", model, "--data", data, "--task", task),
        ("quantize", model, "-o", out, "--scheme", "W8A8", "--data", data),
        ("prune", model, "-o", out, "--ratio", "0.3", "--data", data),
        ("distill", model, "--teacher", model, "-o", out, "--data", data),
    ]
    return every[:most]


def cut_off(path: Path) -> None:
    soundfile.write(path, tiny.recordings(1)[0].samples, tiny.RATE)
    path.write_bytes(path.read_bytes()[:5000])


SOUNDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no sound": (lambda path: path.write_text("words"), "is not a readable recording"),
    "empty": (lambda path: path.write_bytes(b""), "is not a readable recording: it is empty"),
    "cut off": (cut_off, "is cut off: its header speaks of"),
    "silent file": (lambda path: soundfile.write(path, np.zeros(0), tiny.RATE), "is empty: it has no samples"),
    "NaN": (lambda path: soundfile.write(path, np.full(99, np.nan), tiny.RATE, subtype="FLOAT"), "are not numbers"),
    "rate": (lambda path: soundfile.write(path, np.zeros(9999), 1), "check its sampling rate"),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_a_recording_that_is_none(mmc: Mmc, home: Path, tmp_path: Path, name: str) -> None:
    make, said = SOUNDS[name]
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    make(data / "a.wav")
    soundfile.write(data / "b.wav", tiny.recordings(1)[0].samples, tiny.RATE)
    lines = [{"file_name": "b.wav", "text": "a cat"}, {"file_name": "a.wav", "text": "a red dog"}]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    commands = [
        *passes(home / "whisper", data, out, "transcription", 4 if name == "NaN" else 2),
        ("eval", home / "clap", "--data", data),
        ("generate", home / "whisper", "--audio", data / "a.wav"),
        ("generate", home / "whisper-onnx", "--audio", data / "a.wav"),
    ]
    for words in commands:
        found = mmc(*words)
        assert found.code == 2, found.out
        assert "a.wav" in found.error
        assert said in found.error or said in found.err


def test_stereo_another_rate_silence_and_length_are_no_mistakes(mmc: Mmc, home: Path, tmp_path: Path) -> None:
    wave = tiny.recordings(1)[0].samples
    sounds = {
        "plain": (wave, tiny.RATE),
        "stereo": (np.stack([wave, wave], 1), tiny.RATE),
        "fast": (wave, 44_100),
        "silent": (np.zeros(tiny.RATE), tiny.RATE),
        "long": (np.tile(wave, 4), tiny.RATE),
    }
    files: list[object] = []
    for name, (samples, rate) in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, rate)
        files += ["--audio", tmp_path / f"{name}.wav"]
    said = [mmc("generate", home / name, *files) for name in ("whisper", "whisper-onnx")]
    assert [found.code for found in said] == [0, 0]
    assert said[0].out == said[1].out
    plain, stereo, *_ = said[0].out.splitlines()
    assert plain == stereo
    assert len(said[0].out.splitlines()) == 5


FRAMES: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "missing": ({"frames": "clip"}, lambda folder: (folder / "2.png").unlink(), "frame 2 is missing between"),
    "unequal": (
        {"frames": "clip"},
        lambda folder: Image.new("RGB", (20, 20)).save(folder / "3.png"),
        "has 20 x 20 pixels, the first has 56 x 56",
    ),
    "broken": ({"frames": "clip"}, lambda folder: (folder / "2.png").write_bytes(b"xx"), "is not a readable image"),
    "many": ({"frames": ["clip/1.png"] * 769}, lambda _: None, "has 769 frames; at most 768 are taken"),
    "too long": ({"frames": ["clip/1.png"] * 150}, lambda _: None, "tokens with its 150 pictures; qwen_vl takes 256"),
    "none": ({"frames": "nowhere"}, lambda _: None, "which is no folder inside the data folder"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_that_make_no_video(mmc: Mmc, home: Path, clip: Path, tmp_path: Path, name: str) -> None:
    row, damage, said = FRAMES[name]
    damage(clip / "clip")
    data = rows(clip, {"id": "a", **row}, {"id": "b", "file_name": "0.png"})
    for words in passes(home / "qwen2_5_vl", data, tmp_path / "out", "vqa", 4 if name == "unequal" else 2):
        refused(mmc, said, *words)


def test_what_generate_says_of_frames_and_pictures(mmc: Mmc, home: Path, clip: Path, tmp_path: Path) -> None:
    qwen, llava = home / "qwen2_5_vl", home / "llava_clip"
    shown = [word for _ in range(20) for word in ("--image", clip / "0.png")]
    refused(mmc, "no folder at", "generate", qwen, "--frames", clip / "0.png")
    refused(mmc, "holds no frames", "generate", qwen, "--frames", tmp_path)
    refused(mmc, "is not in the range", "generate", qwen, "--frames", clip / "clip", "--fps", "0")
    refused(mmc, "nan frames per second", "generate", qwen, "--frames", clip / "clip", "--fps", "nan")
    for model in (llava, home / "llava_clip-onnx"):
        refused(mmc, "with its 20 pictures; llava takes 256", "generate", model, *shown, "--together")
    other = {"file_name": "0.png", "answers": ["a dog"]}
    refused(
        mmc,
        "has 2 images where one image",
        "eval",
        home / "clip",
        "--data",
        rows(clip, {"id": "a", "images": ["0.png"] * 2}, other),
    )
    refused(
        mmc, "has video frames where one image", "eval", home / "clip", "--data", rows(clip, {"frames": "clip"}, other)
    )
    soundfile.write(tmp_path / "a.wav", tiny.recordings(1)[0].samples, tiny.RATE)
    refused(mmc, "llava models hear nothing", "generate", llava, "--audio", tmp_path / "a.wav")
    for model in ("whisper", "whisper-onnx"):
        refused(mmc, "only transcribes", "generate", home / model, "--audio", tmp_path / "a.wav", "--prompt", "hi")
        refused(mmc, "has no audio", "generate", home / model, "--frames", clip / "clip")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"file_name": "0.png", "question": "<image> <image> what ?"},
            "holds <image> 2 times, which stands for a picture",
        ),
        ({"images": ["0.png"] * 2, "question": "<image> what ?"}, "holds <image>, which stands for a picture"),
        ({"file_name": "0.png", "turns": [["<video> ?", "no"]]}, "holds <video>, which stands for a picture"),
    ],
)
def test_placeholders_in_a_question(
    mmc: Mmc, home: Path, clip: Path, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    data = rows(clip, {"id": "a", **row})
    for words in passes(home / "llava_clip", data, tmp_path / "out", "vqa"):
        refused(mmc, said, *words)
    refused(mmc, said, "eval", home / "llava_clip-onnx", "--data", data, "--task", "vqa")


def test_a_placeholder_in_an_answer(mmc: Mmc, home: Path, clip: Path, tmp_path: Path) -> None:
    data = rows(clip, {"file_name": "0.png", "answers": ["a <image> b"]})
    # Not `eval --task vqa`: it compares texts and leads no model through the answer.
    _, *words = passes(home / "llava_clip", data, tmp_path / "out", "vqa", 4)
    for one in (*words, ("eval", home / "llava_clip", "--data", data, "--task", "perplexity")):
        refused(mmc, "holds <image>, which stands for a picture", *one)


GOOD = tiny_vlm.TEMPLATE.replace("BEFORE", "").replace("AFTER", "")
TEMPLATES = {
    "no place": (GOOD.replace("<image>", ""), "writes 0 image tokens (<image>)"),
    "two places": (GOOD.replace("<image>", "<image><image>"), "writes 2 image tokens (<image>)"),
    "empty": ("", "leaves out the question"),
    "raises": ("{{ raise_exception('no pictures, please') }}", "fails: no pictures, please"),
    "no Jinja": ("{% for m in messages %}{{ m.role }", "fails: unexpected"),
    "undefined": ("{{ nothing.at.all }}", "fails: 'nothing' is undefined"),
    "adds a list": ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "fails: can only concatenate"),
    "plain texts": ("{% for m in messages %}{{ m.content }}{% endfor %}", "takes plain texts, not lists"),
    "divides": ("{{ 1 / 0 }}", "fails: division by zero"),
    "endless": ("{% for i in range(10000000) %}x{% endfor %}", "fails: Range too big"),
    "two lines": ("{{ raise_exception('first\\nsecond') }}", "fails: first"),
    "no text": (b"\xff\xfe", "is not text in UTF-8"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_does_not_fit(mmc: Mmc, home: Path, clip: Path, tmp_path: Path, name: str) -> None:
    text, said = TEMPLATES[name]
    for model in ("llava_clip", "qwen2_5_vl", *(["llava_clip-onnx"] if name == "raises" else [])):
        copy = Path(shutil.copytree(home / model, tmp_path / model))
        (copy / "chat_template.jinja").write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(mmc, said, "generate", copy, "--image", clip / "0.png", "--prompt", "what is this ?")
    if name == "raises":
        data = rows(clip, {"file_name": "0.png"})
        for words in passes(tmp_path / "llava_clip", data, tmp_path / "out", "vqa"):
            refused(mmc, said, *words)


def test_no_chat_template(mmc: Mmc, home: Path, clip: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(home / "qwen2_5_vl", tmp_path / "model"))
    (copy / "chat_template.jinja").unlink()
    refused(mmc, "has no chat template", "generate", copy, "--image", clip / "0.png")


@pytest.mark.parametrize("content", [b"", b'{"a"', b"[]", b"\xff\xfe"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"]
)
def test_damaged_files_beside_the_weights(mmc: Mmc, home: Path, tmp_path: Path, name: str, content: bytes) -> None:
    copy = Path(shutil.copytree(home / "llava_clip", tmp_path / "model"))
    (copy / name).write_bytes(content)
    refused(mmc, name, "generate", copy, "--prompt", "what ?")
