"""From what a user names to a task of lm-eval run on it, paired with an earlier run of the same task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.evaluate.answers import Answering, abilities
from mmcompress.evaluate.evaluation import Evaluation, compare
from mmcompress.evaluate.harness import PREFIX, run_harness
from mmcompress.evaluate.likelihoods import read_answers
from mmcompress.evaluate.store import read_evaluation
from mmcompress.jobs.embedders import open_model


def harness_task(tasks: Sequence[str]) -> str:
    """Return the name of lm-eval's task among `tasks`, "" without one. Raises UsageError when it is not alone."""
    names = [task.removeprefix(PREFIX) for task in tasks if task.startswith(PREFIX)]
    if names and len(tasks) > 1:
        raise UsageError(
            f"{PREFIX}{names[0]} is asked for together with other tasks", hint="its documents are its own: run it alone"
        )
    return names[0] if names else ""


def evaluate_harness(
    target: str | Path,
    name: str,
    *,
    runner: str = "onnxruntime",
    device: str = "cpu",
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
    reference: Evaluation | None = None,
) -> Evaluation:
    """Run lm-eval's task `name` on what `target` names; a .npz is an evaluation already.

    Raises UsageError for a model that does not answer in text, and what `run_harness` and `compare` raise.
    """
    if str(target).endswith(".npz"):
        return read_evaluation(Path(target))
    model = open_model(target, runner, device)
    gives = abilities(model)
    if "answers" not in gives or not isinstance(model, Answering):
        raise UsageError(
            f"{PREFIX}{name} needs answers, and this model gives {' and '.join(sorted(gives)) or 'none'}",
            hint="evaluate a model that answers in text",
        )
    read = (
        partial(read_answers, model, with_end=False) if isinstance(model, Bundle) and "likelihoods" in gives else None
    )
    found = run_harness(model, read, name, limit, batch, seed)
    if reference is None:
        return found
    return dataclasses.replace(found, differences=compare(reference, found, seed))
