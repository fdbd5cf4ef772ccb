"""`--dry-run`: what a recipe would do to this model, and roughly what time, memory and disk it takes. Nothing is written."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcompress import checkpoint, pipeline, streamed
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, batches, open_data
from mmcompress.evaluate.answers import abilities
from mmcompress.jobs.compress import streams
from mmcompress.jobs.refusals import require_quantized, require_usable, trains_integers, with_tasks
from mmcompress.measure.cost import cost_of
from mmcompress.passes.base import Work
from mmcompress.progress import Progress
from mmcompress.recipe import Recipe
from mmcompress.room import HELD, available
from mmcompress.staging import refuse_existing
from mmcompress.surgery.master_weights import holders

# Measured on the demo's CLIP and the DINOv2-S + MiniLM dual encoder, 2 cores: tracing, checking and writing one tower's graph,
# and loading it into one runner; and a metric's intervals.
EXPORTED, STATISTICS = 15.0, 2.0
# Bytes a second that are hashed, read, rounded and written layer by layer (bench/results/streaming.json).
STREAMED = 5.5e7
# Times the model's size in memory: with gradients, AdamW's two moments and the teacher beside it; and a search trains a copy.
TRAINED, COPIED = 5.5, 1.0
# Bytes of each integer that trains: its master weight, rounded in a forward with a byte that says whether it lies inside the grid;
# and its gradient, two moments and the teacher's, where the model that is given holds integers already.
ROUNDED, TAUGHT = 5, 4 + 3 * 4 + 4


def estimate(
    model: str | Path, recipe: Recipe, output: Path, *, allow_pickle: bool = False, progress: Progress
) -> dict[str, Any]:
    """Check the whole recipe against the model and data, time one batch, and return the plan as a document.

    Where there is no data nothing has to run, and no weight is read; nor where the run goes layer by layer, which is timed with
    zeros for weights. Raises what a real run would raise for bad input.
    """
    refuse_existing(Path(output))
    todo = pipeline.stages(recipe.steps)
    require_usable(recipe, todo)
    calibration = open_data(recipe.data.calibration) if recipe.data.calibration else None
    evaluation = open_data(recipe.data.evaluation) if recipe.data.evaluation else None
    shown = evaluation or calibration
    layerwise = streams(recipe, todo, model)
    bundle = (
        checkpoint.outline(model, allow_pickle=allow_pickle)
        if layerwise or not shown
        else checkpoint.load(model, device=recipe.device, allow_pickle=allow_pickle)
    )
    if layerwise:
        bundle = streamed.Streamed(**vars(bundle))
    recipe = with_tasks(recipe, bundle, evaluation)
    require_quantized(todo, bundle)
    for stage in todo:
        stage.made.check(bundle)
    forward, states = 0.0, 0
    if shown:
        progress.say("timing one batch")
        with _widest(bundle) as widest:
            forward = _seconds_per_sample(bundle, shown, 1 if layerwise else recipe.data.batch_size)
        # Between two layers there is a state beside what the widest was given and gives.
        states = 2 * widest[0] * min(recipe.data.num_samples, len(shown))
    measured = 0.0
    if evaluation:
        count = min(len(evaluation), recipe.data.evaluation_samples or len(evaluation))
        answers = _seconds_per_answer(bundle, evaluation) if "answers" in abilities(bundle) else forward
        measured = answers * count + STATISTICS
    work = Work(
        samples=min(recipe.data.num_samples, len(calibration)) if calibration else 0,
        dataset=len(calibration) if calibration else 0,
        forward=forward,
    )
    steps: list[dict[str, Any]] = []
    for stage in todo:
        # A control is planned, applied, fitted and measured like the step itself.
        control = stage.made.control() if recipe.control and evaluation else None
        seconds = sum(each.seconds(bundle, work) + measured for each in (stage.made, control) if each is not None)
        steps.append({"step": stage.step.name, "params": dict(stage.step.params), "seconds": round(seconds)})
    exported = 2 * len(bundle.towers()) * EXPORTED if recipe.export.to else 0.0
    size, free = cost_of(bundle).bytes, available()
    stored = bundle.source.bytes or size
    if layerwise:
        memory = streamed.memory_needed(bundle, todo, states)
        # The result; what is decided of samples, and layers put aside to be judged, take as much each.
        copies, written = 3 if calibration else 1, stored / STREAMED
    else:
        written = 0.0
        needs = {"distill": TRAINED, "search-prune": TRAINED + COPIED}
        memory = round(max(needs.get(stage.step.name, HELD) for stage in todo) * size)
        if any(trains_integers(stage) for stage in todo):
            integers = sum(layer.weight_shape.numel() for layer in holders(bundle.model).values())
            # Of a model that is still float, a step before makes them.
            memory += (ROUNDED + TAUGHT) * integers if integers else ROUNDED * size // 4
        # A checkpoint after every step, the result, and both sides exported.
        copies = len(todo) + 1 + (2 if recipe.export.to else 0)
    return {
        "model": bundle.source.id,
        "steps": steps,
        "seconds": sum(step["seconds"] for step in steps) + round(measured + exported + written),
        "memory_mib": round(memory / 2**20),
        "memory_free_mib": None if free is None else round(free / 2**20),
        "disk_mib": round(copies * stored / 2**20),
        "disk_free_mib": round(shutil.disk_usage(_existing(Path(output).absolute())).free / 2**20),
    }


@contextlib.contextmanager
def _widest(bundle: Bundle) -> Iterator[list[int]]:
    """Yield, as the one number of a list, the bytes that any Linear is given and gives in a call at most."""
    most = [0]

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        most[0] = max(most[0], sum(each.nbytes for each in (*args, output)))

    handles = [m.register_forward_hook(after) for m in bundle.model.modules() if isinstance(m, nn.Linear)]
    try:
        yield most
    finally:
        for handle in handles:
            handle.remove()


def _seconds_per_sample(bundle: Bundle, data: Dataset, batch: int) -> float:
    """One sample through preprocessing and all towers, from one batch after another that warms up."""
    samples = next(iter(batches(data.subset(batch, 0), batch)))
    total = 0.0
    for tower in bundle.towers():
        items = [item for sample in samples for item in bundle.items(tower.name, sample)[:1]]
        for _ in range(2):
            started = time.perf_counter()
            if items:
                bundle.embed(tower.name, items)
            else:
                _encode(bundle, tower.name, batch)
            seconds = (time.perf_counter() - started) / (len(items) or batch)
        total += seconds
    return total


def _seconds_per_answer(bundle: Bundle, data: Dataset) -> float:
    """Two samples' answers, after one that warms up: a token takes as long for one as for a few."""
    samples = list(data.subset(3, 0))
    bundle.generate(samples[:1])
    started = time.perf_counter()
    bundle.generate(samples[1:] or samples)
    return (time.perf_counter() - started) / (len(samples[1:]) or 1)


@torch.inference_mode()
def _encode(bundle: Bundle, tower: str, batch: int) -> None:
    bundle.encode(tower, bundle.example_inputs(tower, batch))


def _existing(path: Path) -> Path:
    """The nearest directory above `path` that exists."""
    while not path.exists():
        path = path.parent
    return path
