"""Killed and resumed, or split over processes: the weights are those of one run at one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.passes import distilling
from tests.processes import PROCESSES

ROOT = Path(__file__).parents[2]


def facts(out: Path) -> dict[str, Any]:
    """What the run that wrote `out` reported, without how long it took."""
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    assert found.pop("seconds_per_step") > 0
    return found


def run(out: Path, workdir: Path, settings: dict[str, Any], family: str = "clip") -> None:
    process = PROCESSES.Process(target=distilling.main, args=(out, workdir, settings, family))
    process.start()
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("clip", {"augment": True, "ema": 0.9}),
        ("clip", {"accumulate": 2, "max_minutes": 60.0}),
        ("whisper", {"accumulate": 2, "ema": 0.9}),
        ("clip", {"train": "quantized-weights", "augment": True, "ema": 0.9}),
        ("whisper", {"train": "quantized-weights"}),
        ("whisper", {"train": "lora"}),
    ],
)
def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    settings = {"save_minutes": 0.0, **settings}
    whole, broken, workdir = tmp_path / "whole", tmp_path / "broken", tmp_path / "work"
    run(whole, tmp_path / "other", settings, family)
    reached = PROCESSES.Event()
    process = PROCESSES.Process(target=distilling.hang_after, args=(3, reached, broken, workdir, settings, family))
    process.start()
    assert reached.wait(120)
    process.kill()
    process.join()
    assert not broken.exists()
    run(broken, workdir, settings, family)
    assert broken.read_bytes() == whole.read_bytes()
    assert facts(broken) == facts(whole)


# Gradients far below AdamW's eps make its steps as large as the gradient, so that half a gradient would show.
PAIRS = {"augment": True, "feature": 1e-6, "interactive": 1e-6, "relational": 1e-6, "logit": 1e-6}
ANSWERS = {"answer": 1e-6, "cross_entropy": 1e-6, "hidden": 1e-6}


def launched(folder: Path, settings: dict[str, Any], family: str) -> None:
    """Train in two processes, with four samples in each; the result is `folder`/pair."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", distilling.__file__]
    arguments = [str(folder / "pair"), str(folder / "work"), json.dumps({**settings, "batch_size": 4}), family]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("family", "losses"), [("clip", PAIRS), ("whisper", ANSWERS)])
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, family: str, losses: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    settings = {"steps": 3, "clip": 0.0, "learning_rate": 1e-3, **losses}
    launched(tmp_path, settings, family)
    run(tmp_path / "alone", tmp_path / "other", {**settings, "batch_size": 8}, family)
    one, two = load_file(tmp_path / "alone"), load_file(tmp_path / "pair")
    assert max((value - two[name]).abs().max().item() for name, value in one.items()) < 1e-5
    found = facts(tmp_path / "pair")
    assert found["processes"] == 2
    assert found["samples_seen"] == 24


def test_two_processes_train_the_same_integers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    settings = {
        "steps": 3,
        "clip": 0.0,
        "learning_rate": 1e-2,
        "keep_worse": True,
        "train": "quantized-weights",
        **PAIRS,
    }
    launched(tmp_path, settings, "clip")
    run(tmp_path / "alone", tmp_path / "other", {**settings, "batch_size": 8})
    one, two = load_file(tmp_path / "alone"), load_file(tmp_path / "pair")
    packed = [name for name in one if name.endswith("weight_int4")]
    assert packed
    # Sums in another order: a master on the border of two integers may go to either.
    differing = sum(int((one[name] != two[name]).sum()) for name in packed)
    assert differing <= 1e-3 * sum(one[name].numel() for name in packed)
    assert facts(tmp_path / "pair")["quantized_weights"]["changed"] > 0.01
