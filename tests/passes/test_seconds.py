"""What `--dry-run` expects of each pass, computed by hand: 10 samples, 100 to train on, half a second each."""

from __future__ import annotations

from typing import Any

import pytest

from mmcompress import passes
from mmcompress.passes.base import Work
from tests import tiny

WORK = Work(samples=10, dataset=100, forward=0.5)


@pytest.mark.parametrize(
    ("name", "params", "seconds"),
    [
        ("prune", {}, (3 + 2) * 10 * 0.5),
        ("prune", {"score": "activation", "compensate": "none"}, 1 * 10 * 0.5),
        ("prune", {"score": "obs", "compensate": "none"}, 3 * 10 * 0.5),
        # 20 allocations on 4 samples, whose means are looked at too.
        ("prune", {"allocate": "evolutionary", "evaluations": 20, "judging_samples": 4}, (50 + (20 + 2) * 4) * 0.5),
        ("prune", {"score": "magnitude", "compensate": "bias"}, 2 * 10 * 0.5),
        ("prune", {"score": "random", "compensate": "none"}, 0),
        ("prune", {"score": "block-influence", "units": ["blocks"]}, 1 * 10 * 0.5),
        ("merge-tokens", {"keep": 0.5}, 0),
        ("merge-tokens", {"keep": 0.5, "schedule": "similar"}, 4 * 10 * 0.5),
        ("merge-tokens", {"similarity": 0.9}, 4 * 10 * 0.5),
        # Three blocks in the deeper tower, two in the other: 2 * (2 * 3 + 3) judgements of the 10 samples there are.
        # Five strengths of smoothing, each on the two samples that are held back.
        ("quantize", {"sensitivity": True}, (2 * 10 + 2 * 9 * 10 + 2 * 5 * 2) * 0.5),
        ("quantize", {}, (2 * 10 + 2 * 2 * 10 + 2 * 5 * 2) * 0.5),
        ("quantize", {"smooth": 0.75}, (2 * 10 + 2 * 2 * 10) * 0.5),
        ("quantize", {"observer": "mse"}, (2 * 10 + 2 * 2 * 10) * 0.5),
        ("quantize", {"scheme": "W8A16", "sensitivity_samples": 4, "sensitivity": True}, 2 * 9 * 4 * 0.5),
        ("quantize", {"scheme": "W4A16", "sensitivity_samples": 0}, 0),
        ("quantize", {"scheme": "W4A16", "rounding": "gptq", "sensitivity_samples": 0}, 1 * 10 * 0.5),
        ("quantize", {"sensitivity_samples": 0}, 2 * 10 * 0.5),
        ("quantize", {"scheme": "W16A16"}, 0),
        # Each of the deepest tower's six parts in 4 and in 8 bits, and five runs for what is whole: 2 * (2 * 6 + 5).
        ("quantize", {"scheme": "auto", "bits": 5}, 2 * 17 * 10 * 0.5),
        ("quantize", {"scheme": "auto", "bits": 5, "assign": "random"}, 0),
        ("quantize", {"scheme": "auto", "latency_ms": 5}, (2 * 10 + 2 * 17 * 10 + 2 * 5 * 2) * 0.5 + 120),
        (
            "quantize",
            {"scheme": "W16A16", "text_scheme": "W8A8", "sensitivity": True},
            (2 * 10 + 2 * 7 * 10 + 2 * 5 * 2) * 0.5,
        ),
        ("distill", {"epochs": 2}, (3 * 200 + 100) * 0.5),
        ("distill", {"steps": 4, "batch_size": 8, "accumulate": 2}, (3 * 64 + 100) * 0.5),
        ("distill", {"epochs": 2, "max_minutes": 1}, 60 + 100 * 0.5),
        ("distill", {"epochs": 0}, 0),
    ],
)
def test_by_hand(name: str, params: dict[str, Any], seconds: float) -> None:
    assert passes.build(name, params).seconds(tiny.bundle("clip"), WORK) == pytest.approx(seconds)


def test_the_teacher_of_a_model_that_answers_runs_in_every_step() -> None:
    whisper = tiny.bundle("whisper")
    assert passes.build("distill", {"epochs": 2}).seconds(whisper, WORK) == (4 * 200 + 100) * 0.5
    # 8 samples a batch, where nothing else is said
    assert passes.build("distill", {"steps": 4}).seconds(whisper, WORK) == (4 * 32 + 100) * 0.5
