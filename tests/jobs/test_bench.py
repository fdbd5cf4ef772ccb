"""`mmc bench`: what can run where, honest findings, and the real thing on a tiny model in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmcompress import checkpoint
from mmcompress.errors import MissingError, UsageError
from mmcompress.export.artifact import TensorSpec
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.arrays import arrays_for
from mmcompress.jobs.bench import Bench, Settings, bench, require_speedup
from mmcompress.jobs.bench_answers import open_targets
from mmcompress.jobs.bench_targets import Target, Variant, open_source
from mmcompress.jobs.check import check
from mmcompress.jobs.speed import BEST, TowerSpeed
from mmcompress.measure.macs import macs
from mmcompress.ops.statistics import Estimate
from mmcompress.progress import Silent
from tests import tiny

QUICK = Settings(runners=("onnxruntime",), rounds=5, threads=1, memory=False)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiny CLIP as a checkpoint and exported."""
    home = tmp_path_factory.mktemp("bench")
    made = tiny.bundle("clip")
    checkpoint.save(made, home / "clip")
    export_onnx(made, home / "clip-onnx", batches=(1,))
    return {"checkpoint": home / "clip", "exported": home / "clip-onnx"}


def speed(value: float, half: float, tower: str = "vision", runner: str = "openvino") -> TowerSpeed:
    return TowerSpeed(tower, runner, 1, 2, 10.0, 10.0 / value, Estimate(value, value - half, value + half, 50), "A")


def made_of(*speeds: TowerSpeed) -> Bench:
    return Bench(Settings(), {"busy": None}, speeds=[("B", one) for one in speeds])


def test_a_slowdown_is_the_first_line() -> None:
    found = made_of(speed(2.0, 0.1, "vision"), speed(0.5, 0.05, "text")).findings()
    assert [finding.level for finding in found] == ["bad", "good"]
    assert found[0].text == "0.50x [0.45, 0.55] n=50 — SLOWER than A: B, text, batch 1, 2 threads, openvino"


def test_what_noise_hides_is_no_gain() -> None:
    found = made_of(speed(1.3, 0.4)).findings()
    assert found[0].level == "note"
    assert "not measurably faster" in found[0].text


def test_the_best_of_each_side_counts_but_no_slowdown_is_hidden() -> None:
    best = speed(1.5, 0.1, runner=f"{BEST}: torch against openvino")
    found = made_of(speed(3.0, 0.1), best, speed(0.7, 0.1, runner="torch")).findings()
    assert [finding.level for finding in found] == ["bad", "good"]
    assert "1.50x" in found[1].text


def test_a_busy_machine_is_said() -> None:
    made = Bench(Settings(), {"busy": "the machine was busy"}, speeds=[("B", speed(2.0, 0.1))])
    assert made.findings()[-1].text == "the machine was busy"


def test_the_gate_takes_the_worst_tower() -> None:
    made = made_of(speed(2.0, 0.1, "vision"), speed(1.2, 0.1, "text"))
    assert require_speedup(made, 1.1) is None
    reason = require_speedup(made, 1.5)
    assert reason is not None
    assert "text" in reason
    assert "1.20x" in reason
    with pytest.raises(UsageError, match="only one was given"):
        require_speedup(made_of(), 1.5)


def test_who_can_run_what(places: dict[str, Path], tmp_path: Path) -> None:
    model, exported = open_targets([str(places["checkpoint"]), str(places["exported"])], "cpu", tmp_path, 32, Silent())
    runners = ("torch", "onnxruntime", "openvino")
    assert {variant.runner for variant in model.variants(runners, ())} == set(runners)
    assert exported.variants(runners, ()) == [Variant("onnxruntime"), Variant("openvino")]
    assert exported.variants(("torch",), ()) == []
    assert model.variants(("openvino",), ("bf16",)) == [Variant("openvino", "bf16")]
    assert Variant("torch", "bf16").label == "torch bf16"
    # onnxruntime takes its precision from the file: left out beside an engine that can lower it, else refused when loaded
    both = [Variant("onnxruntime"), Variant("openvino"), Variant("openvino", "bf16")]
    assert exported.variants(("onnxruntime", "openvino"), ("fp32", "bf16")) == both
    assert exported.variants(("onnxruntime",), ("bf16",)) == [Variant("onnxruntime", "bf16")]


def test_both_forms_are_given_the_same_inputs(places: dict[str, Path], tmp_path: Path) -> None:
    model, exported = open_targets([str(places["checkpoint"]), str(places["exported"])], "cpu", tmp_path, 32, Silent())
    for tower in model.towers:
        first, second = (arrays_for(target.specs(tower), 3, 5) for target in (model, exported))
        assert first.keys() == second.keys()
        for name, array in first.items():
            assert np.array_equal(array, second[name])


def test_two_of_one_name_are_told_apart(places: dict[str, Path], tmp_path: Path) -> None:
    same = [str(places["checkpoint"])] * 2
    assert [target.name for target in open_targets(same, "cpu", tmp_path, 32, Silent())] == ["clip (1)", "clip (2)"]


def test_inputs_fit_their_specs() -> None:
    specs = (
        TensorSpec("pixel_values", "float32", ("batch", 49, 192)),
        TensorSpec("pixel_attention_mask", "int64", ("batch", 49)),
        TensorSpec("spatial_shapes", "int64", ("batch", 2)),
        TensorSpec("input_ids", "int64", ("batch", "tokens")),
    )
    made = arrays_for(specs, 3, 7)
    assert {name: array.shape for name, array in made.items()} == {
        "pixel_values": (3, 49, 192), "pixel_attention_mask": (3, 49), "spatial_shapes": (3, 2), "input_ids": (3, 7),
    }  # fmt: skip
    assert (made["spatial_shapes"] == 7).all()  # 7 * 7 patches
    assert (made["pixel_attention_mask"] == 1).all()


def test_the_real_thing(places: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint beside its own export: the same graph twice, so neither can be much faster."""
    made = bench([str(places["checkpoint"]), str(places["exported"])], QUICK)
    document = json.loads(json.dumps(made.to_json()))
    assert [target["kind"] for target in document["targets"]] == ["checkpoint", "exported"]
    assert document["targets"][0]["macs"] == document["targets"][1]["macs"]
    assert "exported to ONNX" in document["targets"][0]["notes"][0]
    assert {(row["target"], row["tower"]) for row in document["results"]} == {
        (name, tower) for name in ("clip", "clip-onnx") for tower in ("vision", "text")
    }
    for row in document["results"]:
        assert row["facts"]["engine"] == "onnxruntime"
        assert row["request_throughput"] == pytest.approx(1e3 / row["median_ms"])
    assert {ratio["against"] for ratio in document["ratios"]} == {"clip"}
    assert set(document["stages"][0]) == {
        "target", "prepare_vision_ms", "encode_vision_ms", "prepare_text_ms", "encode_text_ms",
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert not check(tmp_path / "run.json", tmp_path / "run.json").failed


def test_macs_of_a_checkpoint_are_those_of_its_graph(places: dict[str, Path], tmp_path: Path) -> None:
    """Counted on the running model and on the exported graph, two ways that share no code."""
    model = Target(open_source(str(places["checkpoint"]), "cpu"), "a", "cpu", tmp_path, Silent())
    exported = Target(open_source(str(places["exported"]), "cpu"), "b", "cpu", tmp_path, Silent())
    assert model.bundle is not None
    inputs = model.bundle.example_inputs("vision")
    assert model.macs("vision", 16) == macs(lambda **given: model.bundle.encode("vision", given), inputs).total
    for tower in model.towers:
        assert model.macs(tower, 9) == exported.macs(tower, 9)


def test_peak_memory_comes_from_a_fresh_process(places: dict[str, Path]) -> None:
    made = bench([str(places["exported"])], Settings(runners=("onnxruntime",), towers=("text",), rounds=2, threads=1))
    (row,) = made.to_json()["results"]
    assert 0 < row["added_memory_bytes"] < row["peak_memory_bytes"] < 2**30


def test_what_cannot_run_is_an_error(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs in none of the runners: torch"):
        bench([str(places["exported"])], Settings(runners=("torch",), memory=False))
    with pytest.raises(UsageError, match="no runner 'onxruntime'"):
        bench([str(places["exported"])], Settings(runners=("onxruntime",)))
    with pytest.raises(UsageError, match="no tower 'audio'"):
        bench([str(places["exported"])], Settings(runners=("onnxruntime",), towers=("audio",)))
    engines = tmp_path / "engines"
    engines.mkdir()
    for file in places["exported"].iterdir():
        (engines / file.name).write_bytes(file.read_bytes())
    (engines / "engine.json").write_text('{"api": "tensorrt"}')
    with pytest.raises(MissingError, match="holds engines for tensorrt"):
        bench([str(engines)], Settings(memory=False))
    (engines / "engine.json").write_text("{}")
    with pytest.raises(UsageError, match="is damaged"):
        bench([str(engines)], Settings(memory=False))
