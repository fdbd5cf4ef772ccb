"""`mmc inspect` says of a model it has not read what the loaded model says of itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import CLIPModel

from mmcompress import checkpoint, passes, pipeline
from mmcompress.jobs.estimate import estimate
from mmcompress.jobs.inspect import applies, inspect
from mmcompress.measure.cost import cost_of
from mmcompress.measure.memory import peak_rss_of_command
from mmcompress.passes.base import Context
from mmcompress.progress import Silent
from mmcompress.recipe import parse
from tests import tiny

MIB = 2**20


@pytest.mark.parametrize("name", [*tiny.EVERY, *tiny.MIXTURES])
def test_nothing_is_read_and_everything_is_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tiny.bundle(name), tmp_path / "model")
    (tmp_path / "model" / "mmc.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "digest", lambda _: pytest.fail("the files were read"))
        found = inspect(tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    cost = cost_of(loaded)
    assert (found["parameters"], found["bytes"]) == (cost.parameters, cost.bytes)
    assert {tower["name"]: tower["macs"] for tower in found["towers"]} == {
        tower: each.macs for tower, each in cost.towers.items()
    }
    assert [{key: row[key] for key in ("applies", "reason")} for row in found["passes"]] == [
        applies(loaded, name, tower) for name in passes.PASSES for tower in loaded.towers()
    ]


def test_a_pruned_and_quantized_model_is_counted_as_it_is(tmp_path: Path) -> None:
    bundle = tiny.bundle("dual_encoder_dinov2")
    steps = [{"prune": {"score": "magnitude", "compensate": "none"}}, {"quantize": {"scheme": "W8A16"}}]
    for stage in pipeline.stages(parse({"steps": steps}).steps):
        pipeline.run_stage(bundle, stage, Context())
    checkpoint.save(bundle, tmp_path / "small")
    assert inspect(tmp_path / "small")["towers"][0]["macs"] == cost_of(bundle).towers["vision"].macs
    assert inspect(tmp_path / "small")["bytes"] == cost_of(bundle).bytes


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A CLIP of 200 MiB, nearly all of it words."""
    bundle = tiny.bundle("clip")
    config = bundle.model.config
    config.text_config.vocab_size = 200 * MIB // 4 // config.text_config.hidden_size
    CLIPModel(config).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


@pytest.mark.parametrize("words", [("inspect",), ("quantize", "-o", "out", "--scheme", "W8A16", "--dry-run")])
def test_memory_does_not_follow_the_model(words: tuple[str, ...], large: Path, tmp_path: Path) -> None:
    def peak(model: Path) -> int:
        command, *rest = words
        program = "import sys; from mmcompress.cli.__main__ import main; main()"
        return peak_rss_of_command([sys.executable, "-c", program, command, str(model), *rest]).peak

    checkpoint.save(tiny.bundle("clip"), tmp_path / "small")
    assert peak(large) < peak(tmp_path / "small") + 60 * MIB


def test_a_plan_without_data_runs_nothing(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the weights were read"))
    recipe = parse({"steps": [{"quantize": {"scheme": "W8A16"}}]})
    found = estimate(large, recipe, tmp_path / "out", progress=Silent())
    # a layer of 200 MiB twice, and a shard
    assert 900 < found["memory_mib"] < 940
    assert found["seconds"] > 0
    recipe = parse({"steps": [{"prune": {"ratio": 0.0005, "score": "magnitude", "compensate": "bias"}}]})
    assert 300 < estimate(large, recipe, tmp_path / "out", progress=Silent())["memory_mib"] < 330
