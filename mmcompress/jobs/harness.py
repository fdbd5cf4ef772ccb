"""From what a user names to a task of lm-eval or lmms-eval run on it, paired with an earlier run of the same task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.evaluate.answers import Answering, abilities
from mmcompress.evaluate.evaluation import Evaluation, compare
from mmcompress.evaluate.harness import PREFIXES, run_harness
from mmcompress.evaluate.likelihoods import read_answers
from mmcompress.evaluate.store import read_evaluation
from mmcompress.jobs.embedders import open_model


def harness_task(tasks: Sequence[str]) -> str:
    """Return the task of a harness among `tasks`, "" without one. Raises UsageError when it is not alone."""
    names = [task for task in tasks if task.startswith(PREFIXES)]
    if names and len(tasks) > 1:
        raise UsageError(
            f"{names[0]} is asked for together with other tasks", hint="its documents are its own: run it alone"
        )
    return names[0] if names else ""


def evaluate_harness(
    target: str | Path,
    task: str,
    *,
    runner: str = "onnxruntime",
    device: str = "cpu",
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
    reference: Evaluation | None = None,
) -> Evaluation:
    """Run a task such as "lm-eval:mmmu_val" on what `target` names; a .npz is an evaluation already.

    Raises UsageError for a model that does not answer in text, and what `run_harness` and `compare` raise.
    """
    if str(target).endswith(".npz"):
        return read_evaluation(Path(target))
    model = open_model(target, runner, device)
    gives = abilities(model)
    if "answers" not in gives or not isinstance(model, Answering):
        raise UsageError(
            f"{task} needs answers, and this model gives {' and '.join(sorted(gives)) or 'none'}",
            hint="evaluate a model that answers in text",
        )
    read = (
        partial(read_answers, model, with_end=False) if isinstance(model, Bundle) and "likelihoods" in gives else None
    )
    found = run_harness(model, read, task, limit, batch, seed)
    if reference is None:
        return found
    return dataclasses.replace(found, differences=compare(reference, found, seed))
