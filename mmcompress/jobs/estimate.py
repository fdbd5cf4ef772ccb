"""`--dry-run`: what a recipe would do to this model, and roughly what time, memory and disk it takes. Nothing is written."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import open_data
from mmcompress.jobs.compress import require_usable
from mmcompress.measure.cost import cost_of
from mmcompress.progress import Progress
from mmcompress.recipe import Recipe
from mmcompress.staging import refuse_existing

# A training step costs the forward twice again for gradients.
TRAINING = 3
# Times the model's size in memory: with room to work; with gradients, AdamW's two moments and the teacher beside it.
HELD, TRAINED = 1.5, 5.5


def estimate(
    model: str | Path, recipe: Recipe, output: Path, *, allow_pickle: bool = False, progress: Progress
) -> dict[str, Any]:
    """Check the whole recipe against the model and data, time one batch, and return the plan as a document.

    Raises what a real run would raise for bad input.
    """
    refuse_existing(Path(output))
    todo = pipeline.stages(recipe.steps)
    require_usable(recipe)
    bundle = checkpoint.load(model, device=recipe.device, allow_pickle=allow_pickle)
    for stage in todo:
        stage.made.check(bundle)
    calibration = open_data(recipe.data.calibration) if recipe.data.calibration else None
    evaluation = open_data(recipe.data.evaluation) if recipe.data.evaluation else None
    progress.say("timing one batch")
    per_sample = _seconds_per_sample(bundle, recipe.data.batch_size)
    evaluated = len(evaluation) if evaluation else 0
    if recipe.data.evaluation_samples:
        evaluated = min(evaluated, recipe.data.evaluation_samples)
    steps: list[dict[str, Any]] = []
    for stage in todo:
        seen = min(recipe.data.num_samples, len(calibration)) if calibration else 0
        seconds = per_sample * seen
        if stage.step.name == "distill" and calibration:
            seconds = per_sample * TRAINING * len(calibration) * float(getattr(stage.made, "epochs", 1.0))
        twice = 2 if recipe.control and stage.made.control() is not None else 1
        steps.append(
            {
                "step": stage.step.name,
                "params": dict(stage.step.params),
                "seconds": round(seconds + twice * per_sample * evaluated),
            }
        )
    size = cost_of(bundle).bytes
    stored = bundle.source.bytes or size
    trains = any(stage.step.name == "distill" for stage in todo)
    # A checkpoint after every step, the result, and both sides exported.
    copies = len(todo) + 1 + (2 if recipe.export.to else 0)
    return {
        "model": bundle.source.id,
        "steps": steps,
        "seconds": sum(step["seconds"] for step in steps) + round(per_sample * evaluated),
        "memory_mib": round((TRAINED if trains else HELD) * size / 2**20),
        "disk_mib": round(copies * stored / 2**20),
        "disk_free_mib": round(shutil.disk_usage(_existing(Path(output).absolute())).free / 2**20),
    }


@torch.inference_mode()
def _seconds_per_sample(bundle: Bundle, batch: int) -> float:
    total = 0.0
    for tower in bundle.towers():
        inputs = bundle.example_inputs(tower.name, batch)
        bundle.encode(tower.name, inputs)
        started = time.perf_counter()
        bundle.encode(tower.name, inputs)
        total += (time.perf_counter() - started) / batch
    return total


def _existing(path: Path) -> Path:
    """The nearest directory above `path` that exists."""
    while not path.exists():
        path = path.parent
    return path
