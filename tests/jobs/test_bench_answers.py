"""`mmc bench` of models that answer in text: stages instead of towers, a fixed number of tokens, what a cache takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from mmcompress import checkpoint
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.jobs.bench_answers import AnswerTarget, open_targets
from mmcompress.jobs.bench_targets import Variant
from mmcompress.jobs.check import check
from mmcompress.progress import Silent
from tests import tiny

STAGES = ("audio", "prompt", "token", "answer")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bench")
    made = tiny.bundle("whisper")
    checkpoint.save(made, home / "whisper")
    export_onnx(made, home / "whisper-onnx", batches=(1,))
    checkpoint.save(tiny.bundle("clip"), home / "clip")
    return {"checkpoint": home / "whisper", "exported": home / "whisper-onnx", "clip": home / "clip"}


def opened(places: dict[str, Path], scratch: Path) -> list[AnswerTarget]:
    paths = [str(places["checkpoint"]), str(places["exported"])]
    return cast(list[AnswerTarget], open_targets(paths, "cpu", scratch, 8, Silent()))


def test_a_checkpoint_beside_its_export(places: dict[str, Path], tmp_path: Path) -> None:
    settings = Settings(runners=("torch", "onnxruntime"), rounds=3, threads=1, batch=2, new_tokens=8, memory=False)
    made = bench([str(places["checkpoint"]), str(places["exported"])], settings)
    document = json.loads(json.dumps(made.to_json()))
    rows = {(row["target"], row["tower"], row["runner"]): row for row in document["results"]}
    for stage in STAGES:
        assert ("whisper", stage, "torch") in rows
        assert ("whisper", stage, "onnxruntime") in rows
        assert ("whisper-onnx", stage, "onnxruntime") in rows
    assert rows["whisper-onnx", "answer", "onnxruntime"]["facts"]["new_tokens"] == 8
    assert document["targets"][0]["macs"] == document["targets"][1]["macs"]
    assert {ratio["tower"] for ratio in document["ratios"]} == set(STAGES)
    for found in document["stages"]:
        assert found["first_token_ms"] == pytest.approx(found["prepare_ms"] + found["audio_ms"] + found["prompt_ms"])
        assert found["tokens_per_second"] == pytest.approx(2e3 / found["token_ms"])
        # 2 blocks, keys and values, 2 rows of 4 heads of 12 floats: of 50 states heard, and of 2 + 8 tokens.
        assert found["cache_mib"] == 2 * 2 * 2 * 4 * 12 * 4 * (50 + 10) / 2**20
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert not check(tmp_path / "run.json", tmp_path / "run.json").failed


def test_a_stage_is_given_the_shapes_it_has_in_an_answer(places: dict[str, Path], tmp_path: Path) -> None:
    for target in opened(places, tmp_path):
        assert target.towers == STAGES
        shapes = {stage: {k: v.shape for k, v in target.arrays(stage, 3, 16).items()} for stage in STAGES}
        assert shapes["audio"] == shapes["answer"] == {"input_features": (3, 20, 100)}
        assert shapes["prompt"]["input_ids"] == (3, 2)
        assert shapes["prompt"]["past_key_0"] == (3, 4, 0, 12)
        assert shapes["token"]["input_ids"] == (3, 1)
        assert shapes["token"]["past_value_1"] == (3, 4, 2 + 4, 12)  # in the middle of 8 tokens
        assert shapes["token"]["cross_key_1"] == (3, 4, 50, 12)


def test_macs_of_an_answer_are_those_of_its_stages(places: dict[str, Path], tmp_path: Path) -> None:
    """Counted on the running model and on the exported graph, two ways that share no code."""
    model, exported = opened(places, tmp_path)
    for stage in STAGES:
        assert model.macs(stage, 16) == exported.macs(stage, 16)
    audio, prompt, token, answer = (exported.macs(stage, 16) for stage in STAGES)
    assert answer == audio + prompt + 7 * token


def test_an_answer_has_the_tokens_asked_for_whatever_it_says(places: dict[str, Path], tmp_path: Path) -> None:
    (model, exported) = opened(places, tmp_path)
    assert model.bundle is not None
    found = []
    for target, runner in ((model, "torch"), (exported, "onnxruntime")):
        loaded = target.loader(Variant(runner), "answer", 1)()
        found.append(loaded.run(target.arrays("answer", 2, 16))["tokens"])
        loaded.close()
    assert found[0].shape == (2, 8)
    np.testing.assert_array_equal(*found)


def test_peak_memory_is_that_of_a_whole_answer(places: dict[str, Path]) -> None:
    settings = Settings(runners=("onnxruntime",), towers=("token", "answer"), rounds=2, threads=1, new_tokens=4)
    token, answer = bench([str(places["exported"])], settings).to_json()["results"]
    assert token["added_memory_bytes"] is None
    assert 0 < answer["added_memory_bytes"] < answer["peak_memory_bytes"] < 2**30


def test_what_embeds_is_not_compared_with_what_answers(places: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="whisper has audio, prompt, token, answer and clip has vision, text"):
        bench([str(places["checkpoint"]), str(places["clip"])], Settings(memory=False))
