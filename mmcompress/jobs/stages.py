"""Measuring a run stage by stage: costs, accuracy, and a random selection beside whatever selected."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset
from mmcompress.evaluate.answers import abilities
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.store import read_evaluation, write_evaluation
from mmcompress.evaluate.tasks import TASKS, relative_tasks
from mmcompress.evaluate.verdict import random_findings
from mmcompress.measure.cost import cost_of
from mmcompress.passes.base import Context
from mmcompress.pipeline import Stage, Workplace
from mmcompress.recipe import Recipe

ORIGINAL = "00-original"


@dataclass
class Measurements:
    """What was measured of one run so far; kept in the run's directory, so that a resumed run measures nothing twice."""

    model: Bundle | str | Path
    recipe: Recipe
    place: Workplace
    context: Context
    data: Dataset | None
    """What is evaluated on; None: only costs are measured."""
    reference: Evaluation | None = None
    last: Evaluation | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per stage and control, the original first: name, costs, metrics."""
    findings: list[Finding] = field(default_factory=list)
    """How each selecting step compares with a random selection."""
    allow_pickle: bool = False
    earlier: int = 0
    """How many passes the model had behind it before this run."""

    def fresh(self) -> Bundle:
        """Load the original again: the teacher of distillation, and the start of a control of the first step."""
        return load_again(self.model, self.recipe.device, self.allow_pickle)

    def original(self, bundle: Bundle) -> None:
        """Measure the model before anything is done to it."""
        self.earlier = len(bundle.history)
        self._measure(ORIGINAL, bundle)
        self.reference = self.last

    def after(self, stage: Stage, bundle: Bundle, before: Path | None) -> None:
        """Measure a finished step, and a random selection at the same ratio where the pass has such a twin."""
        self._measure(stage.name, bundle)
        twin = stage.made.control(bundle.history[self.earlier + stage.number - 1].plan)
        if self.data is None or not self.recipe.control or twin is None:
            return

        def control() -> Evaluation:
            random = self.fresh() if before is None else checkpoint.load(before, device=self.recipe.device)
            self.context.progress.say(f"control: {stage.step.name} with a random selection")
            pipeline.run_stage(random, dataclasses.replace(stage, made=twin), self.context)
            return self._evaluate(random, None)

        evaluation = self._remembered(f"{stage.name}-random", control)
        assert self.last is not None, "the step itself was measured just before"
        self.findings += [
            Finding(finding.level, f"{stage.step.name}: {finding.text}")
            for finding in random_findings([evaluation], self.last, self.recipe.seed)
        ]
        self.rows.append({"stage": f"{stage.step.name} (random)", "metrics": headlines(evaluation), "control": True})

    def metric_table(self) -> dict[str, dict[str, str]]:
        """Return every metric of the original beside that of the result."""
        if self.reference is None or self.last is None:
            return {}
        before, after = self.reference.estimates, self.last.estimates
        return {
            f"{task}.{metric}": {"original": str(before[task][metric]), "compressed": str(estimate)}
            for task, by_metric in after.items()
            for metric, estimate in by_metric.items()
            if metric in before.get(task, {})
        }

    def _measure(self, name: str, bundle: Bundle) -> None:
        cost = self.place.remember(f"{name}-cost", lambda: cost_of(bundle).to_json())
        row: dict[str, Any] = {"stage": name[3:], **cost}
        if self.data is not None:
            self.last = self._remembered(name, lambda: self._evaluate(bundle, self.reference))
            row["metrics"] = headlines(self.last)
        self.rows.append(row)

    def _remembered(self, name: str, make: Callable[[], Evaluation]) -> Evaluation:
        """An evaluation from the run's directory, made and kept there first when it is not there yet."""
        path = self.place.directory / f"{name}.npz"
        if not path.exists():
            temporary = path.with_suffix(".writing")
            write_evaluation(make(), temporary)
            temporary.replace(path)
        return read_evaluation(path)

    def _evaluate(self, bundle: Bundle, reference: Evaluation | None) -> Evaluation:
        assert self.data is not None, "called only where there is data"
        # Agreement is measured wherever there is something to agree with, asked for or not.
        relative = relative_tasks(abilities(bundle)) if reference else []
        tasks = [*(name for name in self.recipe.tasks if not TASKS[name].relative), *relative]
        return evaluate(
            bundle,
            self.data,
            tasks,
            reference=reference,
            seed=self.recipe.seed,
            batch=self.recipe.data.batch_size,
            progress=self.context.progress,
        )


def headlines(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Return every metric as {"task.metric": estimate}."""
    return {
        f"{task}.{metric}": estimate.to_json()
        for task, by_metric in evaluation.estimates.items()
        for metric, estimate in by_metric.items()
    }


def load_again(model: str | Path | Bundle, device: str, allow_pickle: bool = False) -> Bundle:
    """Load what a run starts from; a bundle is copied, so that the caller's stays as it is."""
    if isinstance(model, Bundle):
        return copy.deepcopy(model)
    return checkpoint.load(model, device=device, allow_pickle=allow_pickle)
