"""Bad input through the real entry: a one-line error, a hint, the exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcompress.measure import runners
from tests.cli.conftest import Mmc

PRUNE = ("--ratio", "0.3", "--score", "magnitude", "--compensate", "none")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """Commands write to tmp_path/out; neither it nor anything hidden beside it may be there afterwards."""
    yield tmp_path / "out"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "."))]


@pytest.fixture
def out(nothing_left: Path) -> Path:
    return nothing_left


def test_an_unknown_family_is_named(mmc: Mmc, model: Path, out: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba", "architectures": ["MambaModel"]}))
    found = mmc("prune", model, "-o", out)
    assert found.code == 2
    assert "MambaModel is not supported" in found.error


def test_missing_weights(mmc: Mmc, model: Path, out: Path) -> None:
    (model / "model.safetensors").unlink()
    found = mmc("prune", model, "-o", out)
    assert found.code == 2
    assert "model.safetensors is missing" in found.error


def test_cut_off_weights(mmc: Mmc, model: Path, out: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = mmc("prune", model, "-o", out)
    assert found.code == 2
    assert "damaged or cut off" in found.error


def test_corrupt_weights(mmc: Mmc, model: Path, out: Path) -> None:
    (model / "model.safetensors").write_bytes(os.urandom(5000))
    found = mmc("quantize", model, "-o", out)
    assert found.code == 2
    assert "damaged or cut off" in found.error


def test_a_pickle_is_refused_unread(mmc: Mmc, model: Path, out: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, model / "pytorch_model.bin")
    found = mmc("prune", model, "-o", out)
    assert found.code == 2
    assert "pickle" in found.error
    assert "--allow-pickle" in found.err


def test_no_such_model(mmc: Mmc, out: Path, tmp_path: Path) -> None:
    found = mmc("inspect", tmp_path / "nowhere")
    assert found.code == 2
    assert "there is no directory" in found.error


RECIPES = {
    "unknown key": ("steps: [prune]\nspeed: fast\n", "recipe has no key 'speed'"),
    "mistyped key": ("step: [prune]\n", "recipe has no key 'step'"),
    "wrong type": ("seed: many\nsteps: [prune]\n", "recipe.seed is 'many'"),
    "ratio 1.5": ("steps:\n- prune: {ratio: 1.5}\n", "prune.ratio is 1.5"),
    "unknown parameter": ("steps:\n- prune: {share: 0.5}\n", "share"),
    "unknown pass": ("steps: [shrink]\n", "shrink"),
    "a list": ("- prune\n", "a recipe is a mapping"),
    "no YAML": ("steps: [prune\n", "is not YAML"),
    "no steps": ("steps: []\n", "no steps"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe(mmc: Mmc, saved: Path, out: Path, tmp_path: Path, name: str) -> None:
    text, said = RECIPES[name]
    (tmp_path / "recipe.yaml").write_text(text)
    found = mmc("compress", saved, tmp_path / "recipe.yaml", "-o", out)
    assert found.code == 2
    assert said in found.error


def test_a_recipe_that_is_not_there(mmc: Mmc, saved: Path, out: Path, tmp_path: Path) -> None:
    found = mmc("compress", saved, tmp_path / "none.yaml", "-o", out)
    assert found.code == 2
    assert "there is no recipe" in found.error


def test_a_mistyped_key_suggests_the_right_one(mmc: Mmc, saved: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: [prune]\nsed: 3\n")
    assert "did you mean 'seed'?" in mmc("compress", saved, tmp_path / "recipe.yaml", "-o", out).err


def test_an_image_that_is_none(mmc: Mmc, saved: Path, data: Path, out: Path) -> None:
    (data / "3.png").write_text("this is no picture")
    for found in (
        mmc("prune", saved, "-o", out, *PRUNE, "--eval-data", data),
        mmc("quantize", saved, "-o", out, "--data", data),
        mmc("eval", saved, "--data", data),
    ):
        assert found.code == 2
        assert "3.png" in found.error


def test_an_empty_data_folder(mmc: Mmc, saved: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for found in (
        mmc("prune", saved, "-o", out, *PRUNE, "--eval-data", tmp_path / "empty"),
        mmc("eval", saved, "--data", tmp_path / "empty"),
    ):
        assert found.code == 2
        assert "empty" in found.error


def test_data_that_is_not_there(mmc: Mmc, saved: Path, out: Path, tmp_path: Path) -> None:
    found = mmc("prune", saved, "-o", out, "--data", tmp_path / "none")
    assert found.code == 2
    assert "does not exist" in found.error


def test_an_output_that_exists_is_not_touched(mmc: Mmc, saved: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for found in (
        mmc("prune", saved, "-o", taken, *PRUNE),
        mmc("export", saved, "-o", taken),
        mmc("report", taken, "-o", taken),
        mmc("demo", "-o", taken),
    ):
        assert found.code == 2
        assert "exists" in found.error
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]


def test_an_output_below_a_file(mmc: Mmc, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for words in (("prune", saved), ("export", saved), ("demo",)):
        found = mmc(*words, "-o", tmp_path / "notes.txt" / "out")
        assert found.code == 2
        assert "notes.txt is a file" in found.error


def full(*rest: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("streamed", [True, False])
def test_a_full_disk(
    streamed: bool, mmc: Mmc, saved: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    monkeypatch.setattr("mmcompress.streamed.save_file", full)
    found = mmc("prune", saved, "-o", out, *PRUNE, *([] if streamed else ["--eval-data", data]))
    assert found.code == 5
    assert "disk is full" in found.error


def test_a_disk_that_is_really_full(mmc: Mmc, saved: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here; the test above stands for it")
    try:
        found = mmc("prune", saved, "-o", place / "out", *PRUNE)
        assert found.code == 5
        assert "disk is full" in found.error
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", place], check=True)


def test_no_runtime_installed(mmc: Mmc, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"):
        spec = runners.RUNNERS[name]
        absent = runners.RunnerSpec(**{**vars(spec), "available": lambda name=name: f"{name} is not installed"})
        monkeypatch.setitem(runners.RUNNERS, name, absent)
    found = mmc("bench", saved, "--runner", "onnxruntime")
    assert found.code == 4
    assert "onnxruntime is not installed" in found.error
    assert "pip install 'mmcompress[cpu]'" in found.err
    (tmp_path / "recipe.yaml").write_text("steps:\n- prune: {score: magnitude, compensate: none}\nexport: {to: onnx}\n")
    found = mmc("compress", saved, tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert found.code == 4
    assert "no runtime" in found.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.parametrize("words", [("prune", "-o", "OUT"), ("eval", "--data", "DATA"), ("bench",)])
def test_cuda_asked_for_without_one(mmc: Mmc, saved: Path, data: Path, out: Path, words: tuple[str, ...]) -> None:
    places = {"OUT": str(out), "DATA": str(data)}
    found = mmc(words[0], saved, *(places.get(word, word) for word in words[1:]), "--device", "cuda")
    assert found.code == 4
    assert "CUDA was asked for" in found.error


def test_an_unknown_device(mmc: Mmc, saved: Path, out: Path) -> None:
    found = mmc("prune", saved, "-o", out, "--device", "gpu")
    assert found.code == 2
    assert "'gpu' is not a device" in found.error


def test_text_longer_than_the_limit_is_cut_and_said(mmc: Mmc, saved: Path, data: Path) -> None:
    """The tiny model takes 20 tokens."""
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines[2]["text"] = "red house " * 40
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = mmc("eval", saved, "--data", data, "--json")
    assert found.code == 0
    assert any("1 of 6 texts" in finding["text"] and "cut" in finding["text"] for finding in found.document["findings"])


def test_wrong_words_on_the_command_line(mmc: Mmc, saved: Path) -> None:
    for words, said, hint in (
        (("prun", "x"), "no command 'prun'", "did you mean 'prune'?"),
        (("prune", saved), "Missing option '-o'", "see mmc prune --help"),
        (("prune", saved, "-o", "x", "--ration", "1"), "No such option", "see mmc prune --help"),
        (("prune", saved, "-o", "x", "--ratio", "half"), "is not a valid float", "see mmc prune --help"),
        (("passes", "shrink"), "shrink", "known: "),
        (("prune", saved, "-o", "x", "--set", "prune.units=[heads"), "is not YAML", "quote the value"),
    ):
        found = mmc(*words)
        assert found.code == 2
        assert said in found.error
        assert hint in found.err


def test_a_real_process_says_it_too(model: Path, out: Path) -> None:
    (model / "config.json").write_text("{")
    command = [sys.executable, "-m", "mmcompress.cli", "prune", str(model), "-o", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["exit_code"] == 2
    assert "config.json is not JSON" in document["error"]
    assert done.stderr.strip().splitlines()[-1].startswith("hint: ")
