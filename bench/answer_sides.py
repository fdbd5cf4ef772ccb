"""Compressed models that answer beside their original: each side exported, its answers judged, its stages timed in one run."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import mmcompress
from bench import assets
from bench.edge import digest
from mmcompress import checkpoint
from mmcompress.data import Dataset
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.jobs.compress import compress
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.measure.latency import compare
from mmcompress.recipe import Recipe

RUNNERS = ("onnxruntime", "openvino")


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return the options all such benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--work", type=Path, help="keep what is built here, and reuse it")
    return made


def report(
    name: str,
    options: argparse.Namespace,
    model: Path,
    recipes: dict[str, Recipe],
    data: Dataset,
    task: str,
    stages: tuple[str, ...],
) -> None:
    """Build the sides, measure, write bench/results/NAME.json and print the summary."""
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        result = measure(build(work, model, recipes), data, task, stages, options.rounds, options.threads)
    asked = " ".join(f"--{key} {value}" for key, value in vars(options).items() if key != "work" and value)
    result |= {
        "command": f"python -m bench.{name} {asked}",
        "steps": {side: made.to_dict()["steps"] for side, made in recipes.items()},
    }
    (assets.RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"speed": result["latency"], "accuracy": result["accuracy"]}, indent=1))


def build(work: Path, model: Path, recipes: dict[str, Recipe]) -> dict[str, Path]:
    """Return the exported sides, the original first; what is in `work` already is not built again."""
    sides = {"original": work / "original-onnx"}
    if not sides["original"].exists():
        export_onnx(checkpoint.load(model), sides["original"], batches=(1, 2))
    for name, made in recipes.items():
        folder = work / f"{name.replace(' ', '-')}-{digest(made)}"
        if not folder.exists():
            compress(model, made, folder, resume=True)
        sides[name] = folder.with_name(f"{folder.name}-onnx")
        if not sides[name].exists():
            export_onnx(checkpoint.load(folder), sides[name], batches=(1, 2))
    return sides


def measure(
    sides: dict[str, Path], data: Dataset, task: str, stages: tuple[str, ...], rounds: int, threads: int
) -> dict[str, Any]:
    """Return accuracy (paired with the original's, answers of OpenVINO), latency by stage, and size of every side.

    `times_as_fast` compares with the original in onnxruntime, paired by round.
    """
    evaluations: dict[str, Evaluation] = {}
    for name, side in sides.items():
        answerer = artifact_answerer(open_artifact(side), RUNNERS[-1], threads=threads)
        tasks = [task, "answer-agreement"] if evaluations else [task]
        evaluations[name] = evaluate(answerer, data, tasks, batch=8, reference=evaluations.get("original"))
        answerer.close()
    settings = Settings(runners=RUNNERS, threads=threads, rounds=rounds, memory=False)
    timed = bench([str(side) for side in sides.values()], settings)
    names = {side.name: name for name, side in sides.items()}
    timings = [row.timing for row in timed.rows if row.timing.tower in stages]
    base = {each.tower: each.samples for each in timings if (names[each.side], each.runner) == ("original", RUNNERS[0])}
    return {
        "mmc": mmcompress.__version__,
        "machine": timed.machine,
        "accuracy": {name: found.to_json() for name, found in evaluations.items()},
        "latency": [
            {
                "side": names[each.side],
                "stage": each.tower,
                "runner": each.runner,
                "p50_ms": each.latency.p50_ms.to_json(),
                "times_as_fast": compare(base[each.tower], each.samples).to_json(),
            }
            for each in timings
        ],
        "stages": {names[row.pop("target")]: row for row in timed.stages},
        "bytes": {name: open_artifact(side).bytes for name, side in sides.items()},
    }
