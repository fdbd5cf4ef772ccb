"""What a run refuses before it begins, so that nothing comes up after the last step; and the tasks it settles on."""

from __future__ import annotations

import dataclasses
import os

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset
from mmcompress.errors import UsageError, closest
from mmcompress.evaluate.answers import abilities
from mmcompress.evaluate.asked import require_able
from mmcompress.evaluate.tasks import TASKS, usual_tasks
from mmcompress.jobs.speed import usable_runners
from mmcompress.passes.base import Context
from mmcompress.passes.distill_job import INTEGERS, integer_layers
from mmcompress.pipeline import Stage
from mmcompress.recipe import Recipe


def require_usable(recipe: Recipe, todo: list[Stage]) -> None:
    """Raise now what would otherwise come up after the last step: an unknown task, no data to train on, a missing runner."""
    for stage in todo:
        # What has a teacher trains.
        learns = hasattr(stage.made, "teacher") and not getattr(stage.made, "neutral", False)
        if learns and not recipe.data.calibration:
            Context().require_data(stage.step.name)
    for name in recipe.tasks:
        if name not in TASKS:
            raise UsageError(f"there is no task '{name}'", hint=closest(name, TASKS))
    if recipe.export.to:
        usable_runners(recipe.export.runners)


def require_alone(todo: list[Stage]) -> None:
    """Raise UsageError where several processes take part and a step is solved by timing, which each would do differently."""
    for stage in todo:
        if getattr(stage.made, "latency_ms", None) is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                f"{stage.step.name}.latency_ms cannot be solved by {os.environ['WORLD_SIZE']} processes at once",
                hint="run that step alone first, then the others on its output",
            )


def require_quantized(todo: list[Stage], bundle: Bundle) -> None:
    """Raise UsageError where integers are to train that neither the model has nor a step before makes, or without a teacher."""
    for stage in todo:
        if stage.step.name == "quantize":
            return
        if trains_integers(stage):
            integer_layers(bundle, getattr(stage.made, "towers", ()) or [tower.name for tower in bundle.towers()])
            if stage.number == 1 and not getattr(stage.made, "teacher", ""):
                raise UsageError(
                    f"distill.train is '{INTEGERS}', and the teacher would be the quantized model itself",
                    hint="give --teacher CHECKPOINT: the model before it was quantized",
                )


def trains_integers(stage: Stage) -> bool:
    """Whether a step trains weights that are stored as integers."""
    return getattr(stage.made, "train", "") == INTEGERS and not getattr(stage.made, "neutral", False)


def with_tasks(recipe: Recipe, bundle: Bundle, data: Dataset | None) -> Recipe:
    """Return `recipe` with the tasks to measure `bundle` by on `data`. Raises UsageError for one that its family cannot do."""
    gives = abilities(bundle)
    for name in recipe.tasks:
        require_able(name, gives)
    return dataclasses.replace(recipe, tasks=recipe.tasks or (usual_tasks(gives, data) if data else ()))
