"""What training wins back of what pruning cost, and whether choosing while training (UPop) is better: four real models.

    python -m bench.recovered [MODEL …] [--way W] [--steps N]      writes bench/results/recovered.json

Half of what can be pruned goes from both towers of the dual encoder and of the demo's CLIP, 30% from Whisper tiny.en, 20% from the
mini-VLM's language model. Every way removes the same number of parameters and trains for the same number of steps in all, towards
the original:

- obs, taylor, random: `prune` by that score (one budget, least squares), then `distill`
- each tower: by Taylor, the same share of each tower and the same widths in all its blocks, then `distill`
- upop: `search-prune` for half of the steps, then `distill`
- upop, random: the same of units drawn once, which closes as progressively

Rows that are there already are kept. R@1 of both directions, word accuracy or right answers; differences are paired, those to
"each tower" as far as both ran on this machine (evaluations are kept in the cache).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mmcompress
from bench import assets
from bench.cells import read, write_result
from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, open_data
from mmcompress.evaluate.evaluation import Evaluation, compare, evaluate
from mmcompress.evaluate.store import read_evaluation, write_evaluation
from mmcompress.evaluate.tasks import TASKS
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import machine_facts
from mmcompress.ops.statistics import paired_difference
from mmcompress.packed import cache_dir
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.recipe import Step

RESULT = assets.RESULTS / "recovered.json"
WAYS = ("obs", "taylor", "upop", "each tower", "random", "upop, random")


@dataclass(frozen=True)
class Subject:
    """A model, how much of what can be pruned goes, and what it learns from and is judged by."""

    model: Callable[[], Any]
    training: Callable[[], str]
    held_out: Callable[[], str]
    task: str
    share: float
    towers: tuple[str, ...]
    training_options: dict[str, Any]
    steps: int
    questions: int = 0
    """How many samples to judge by; 0: all."""


SUBJECTS = {
    "dual-encoder": Subject(
        assets.dual_encoder, lambda: str(assets.training_pairs()), lambda: "demo:test", "retrieval", 0.5, (),
        {"batch_size": 64, "learning_rate": 2e-4}, steps=600,
    ),
    "demo-clip": Subject(
        lambda: "demo:clip", lambda: "demo:train", lambda: "demo:test", "retrieval", 0.5, (),
        {"batch_size": 64, "learning_rate": 2e-4}, steps=600,
    ),
    "whisper": Subject(
        assets.whisper_tiny, lambda: str(assets.speech("train")), lambda: str(assets.speech("test")), "transcription", 0.3, (),
        {"batch_size": 8, "learning_rate": 1e-4, "cross_entropy": 0.5}, steps=240,
    ),
    "mini-vlm": Subject(
        assets.mini_vlm, lambda: str(assets.vqa("training")), lambda: str(assets.vqa("heldout")), "vqa", 0.2, ("language",),
        {"batch_size": 16, "learning_rate": 2e-4, "cross_entropy": 0.5}, steps=300, questions=400,
    ),
}  # fmt: skip


def steps_of(way: str, subject: Subject, bundle: Bundle, count: int) -> list[Step]:
    """Return the recipe of one way."""
    survey = Prune(ratio=0.0, score="magnitude", compensate="none", towers=subject.towers)
    totals, groups, _, _ = survey.survey(bundle, survey.chosen(bundle))
    able = {name: sum(g.units * g.cost.parameters for g in groups if g.tower == name) for name in totals}
    total = sum(costs.parameters for costs in totals.values())
    target = total - subject.share * sum(able.values())
    common = {"multiple": 32, "towers": list(subject.towers)}
    trained = {**subject.training_options, "towers": list(subject.towers)}
    if way.startswith("upop"):
        method = "random" if way == "upop, random" else "upop"
        search = {**common, **trained, "target": target, "method": method, "steps": count // 2}
        return [Step("search-prune", search), Step("distill", {**trained, "steps": count - count // 2})]
    if way == "each tower":
        # Rounded down in the last place, where a share of all units would be refused.
        own = {name: round(subject.share * able[name] / totals[name].parameters, 4) for name in totals}
        chosen = {**common, "ratios": own, "uniform": True, "score": "taylor"}
    else:
        chosen = {**common, "target": target, "score": way}
    return [Step("prune", chosen), Step("distill", {**trained, "steps": count})]


def judged(bundle: Bundle, subject: Subject, data: Dataset, reference: Evaluation | None = None) -> Evaluation:
    """Return what the model reaches on held-out data."""
    return evaluate(bundle, data, [subject.task], batch=16, reference=reference)


def headline(found: Evaluation, subject: Subject) -> dict[str, Any]:
    """Return the main metrics."""
    results = found.to_json()["results"][subject.task]
    return {name: results[name] for name in TASKS[subject.task].headlines if name in results}


def run(name: str, way: str, count: int, work: Path, document: dict[str, Any]) -> None:
    """Prune, train and judge one way."""
    subject = SUBJECTS[name]
    held_out = open_data(subject.held_out())
    held_out = held_out.subset(subject.questions, 0) if subject.questions else held_out
    training = open_data(subject.training())
    model = subject.model()
    rows = document.setdefault(name, {})
    original = judged(checkpoint.load(model), subject, held_out)
    rows["original"] = {"parameters": cost_of(checkpoint.load(model)).parameters, **headline(original, subject)}
    bundle = checkpoint.load(model)
    row: dict[str, Any] = {"steps": []}
    for number, step in enumerate(steps_of(way, subject, bundle, count), 1):
        # What the teacher says of every sample is kept there.
        context = Context(
            data=training, num_samples=256, batch_size=16, teacher=lambda: checkpoint.load(model), workdir=work
        )
        made = passes.build(step.name, step.params)
        record = pipeline.run_stage(bundle, pipeline.Stage(number, step, made), context)
        found = judged(bundle, subject, held_out, original)
        row["steps"].append({
            "pass": step.name,
            "seconds": record.seconds,
            "trained_steps": record.facts.get("steps"),
            "seconds_per_step": record.facts.get("seconds_per_step"),
            "loss": record.facts.get("loss"),
            **headline(found, subject),
        })  # fmt: skip
        print(name, way, json.dumps(row["steps"][-1]), flush=True)
        if "after" in record.plan:
            row["left"] = {
                tower: round(costs["parameters"] / record.plan["before"][tower]["parameters"], 4)
                for tower, costs in record.plan["after"].items()
            }
    row["parameters"] = cost_of(bundle).parameters
    rows[way] = row
    write_evaluation(found, kept(name, way))
    pair_with_each_tower(name, subject, rows)
    document |= {"machine": machine_facts(), "mmc": mmcompress.__version__}
    write_result(RESULT, document)


def kept(name: str, way: str) -> Path:
    """Return where the samples of a way's last evaluation are kept."""
    folder = cache_dir() / "recovered"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name} {way}.npz"


def pair_with_each_tower(name: str, subject: Subject, rows: dict[str, Any]) -> None:
    """Set every way beside the same share of each tower, sample by sample, as far as both are known."""
    uniform = kept(name, "each tower")
    for way, row in rows.items():
        if way not in ("original", "each tower") and uniform.exists() and kept(name, way).exists():
            sides = read_evaluation(uniform), read_evaluation(kept(name, way))
            found = compare(*sides, 0)[subject.task]
            metrics = [metric for metric in TASKS[subject.task].headlines if metric in found]
            row["against_each_tower"] = {metric: found[metric].to_json() for metric in metrics}
            if len(metrics) > 1:
                measured = [[side.results[subject.task][metric].values for metric in metrics] for side in sides]
                both = paired_difference(*(np.mean(each, axis=0) for each in measured))
                row["against_each_tower"]["mean of these"] = both.to_json()


def main() -> None:
    """Run every way that has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], help="which models; all by default")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this; repeatable")
    parser.add_argument("--steps", type=int, help="of training, in place of each model's own number")
    options = parser.parse_args()
    document = read(RESULT.stem)
    document["command"] = "python -m bench.recovered"
    for name in options.subjects or SUBJECTS:
        with tempfile.TemporaryDirectory() as work:
            for way in options.way or WAYS:
                if way not in document.get(name, {}):
                    run(name, way, options.steps or SUBJECTS[name].steps, Path(work), document)


if __name__ == "__main__":
    main()
