"""`mmc quantize`, then `mmc export --to compressed-tensors|gptq|awq`: what a user sees and gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from mmcompress import checkpoint
from tests import tiny
from tests.cli.conftest import Mmc


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "model"
    checkpoint.save(tiny.bundle("llava_clip"), folder)
    return folder


def test_a_quantized_checkpoint_becomes_one_that_others_load(model: Path, mmc: Mmc, tmp_path: Path) -> None:
    made = mmc("quantize", model, "-o", tmp_path / "q", "--scheme", "W4A16", "--group-size", 16)
    assert made.code == 0
    assert f"next: mmc export {tmp_path / 'q'} -o {tmp_path / 'q'}-packed --to compressed-tensors" in made.err
    assert "--to compressed-tensors` (or `gptq`, `awq`, `onnx`)" in (tmp_path / "q" / "README.md").read_text()
    done = mmc("export", tmp_path / "q", "-o", tmp_path / "awq", "--to", "awq")
    assert done.code == 0
    assert "4 bits in groups of 16" in done.out
    assert "`model.language_model.embed_tokens` is written as floats: Embedding, no Linear" in done.out
    assert f"next: {tmp_path / 'awq' / 'README.md'} says what loads it" in done.err
    with safe_open(tmp_path / "awq" / "model.safetensors", "pt") as opened:
        assert "model.language_model.layers.0.self_attn.q_proj.qweight" in opened.keys()  # noqa: SIM118
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert not (tmp_path / "awq" / "mmc.json").exists()
    told = mmc("export", tmp_path / "q", "-o", tmp_path / "ct", "--to", "compressed-tensors", "--json", "-q")
    assert told.document["kinds"] == {"pack-quantized": 42}
    assert told.document["output"] == str(tmp_path / "ct")
    assert told.document["bytes"] == (tmp_path / "ct" / "model.safetensors").stat().st_size
    assert told.document["scales_off"] == 0


@pytest.mark.parametrize("more", [("--tower", "vision"), ("--opset", 20), ("--experts", "every")])
def test_options_of_graphs_are_refused(more: tuple[str, object], model: Path, mmc: Mmc, tmp_path: Path) -> None:
    done = mmc("export", model, "-o", tmp_path / "out", "--to", "gptq", *more)
    assert done.code == 2
    assert done.error == f"{more[0]} does not concern --to gptq, which writes a whole checkpoint"


def test_a_model_of_floats_is_refused_with_the_command_that_quantizes(model: Path, mmc: Mmc, tmp_path: Path) -> None:
    done = mmc("export", model, "-o", tmp_path / "out", "--to", "awq")
    assert done.code == 2
    assert done.error == "nothing of llava_clip is quantized"
    assert not (tmp_path / "out").exists()
