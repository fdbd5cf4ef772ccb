"""Compressed models that answer beside their original: each side exported, its answers judged, its stages timed in one run."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcompress
from bench import assets
from bench.cells import write_result
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
HALF = "bf16"
IN_HALF = f" in {HALF}"


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return the options all such benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--work", type=Path, help="keep what is built here, and reuse it")
    return made


@dataclass(frozen=True)
class Side:
    """One of the models that are compared."""

    checkpoint: Path
    exported: Path


def measured(
    work: Path,
    options: argparse.Namespace,
    model: Path,
    recipes: dict[str, Recipe],
    data: Dataset,
    task: str,
    stages: tuple[str, ...],
) -> dict[str, Any]:
    """Build the sides in `work`; return and print what they answer, how fast and how large they are."""
    sides = build(work, model, recipes)
    result = {
        "accuracy": {side: found.to_json() for side, found in answers(sides, data, task, options.threads).items()},
        **timings(sides, stages, options.rounds, options.threads),
    }
    print(json.dumps({"speed": result["latency"], "accuracy": result["accuracy"]}, indent=1))
    return result


@contextlib.contextmanager
def workplace(options: argparse.Namespace) -> Iterator[Path]:
    """The folder where things are built: the one given with --work, or one that is gone afterwards."""
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        yield work


def write(name: str, options: argparse.Namespace, recipes: dict[str, Recipe], result: dict[str, Any]) -> None:
    """Write bench/results/NAME.json: the command and the steps of each recipe, then `result`."""
    asked = " ".join(f"--{key} {value}" for key, value in vars(options).items() if key != "work" and value)
    document = {
        "command": f"python -m bench.{name} {asked}",
        "mmc": mmcompress.__version__,
        **result,
        "steps": {side: made.to_dict()["steps"] for side, made in recipes.items()},
    }
    write_result(assets.RESULTS / f"{name}.json", document)


def compressed(work: Path, model: Path, name: str, made: Recipe) -> Path:
    """The checkpoint that a recipe makes; what is in `work` already is not made again."""
    folder = work / f"{name.replace(' ', '-')}-{digest(made)}"
    if not folder.exists():
        compress(model, made, folder, resume=True)
    return folder


def build(work: Path, model: Path, recipes: dict[str, Recipe]) -> dict[str, Side]:
    """Return the sides, the original first; what is in `work` already is not built again."""
    sides = {"original": Side(model, work / "original-onnx")}
    for name, made in recipes.items():
        folder = compressed(work, model, name, made)
        sides[name] = Side(folder, folder.with_name(f"{folder.name}-onnx"))
    for side in sides.values():
        if not side.exported.exists():
            export_onnx(checkpoint.load(side.checkpoint), side.exported, batches=(1, 2))
    return sides


def answers(sides: dict[str, Side], data: Dataset, task: str, threads: int) -> dict[str, Evaluation]:
    """Judge what every exported side answers in OpenVINO, in float32 and bfloat16, paired with what the original does."""
    found: dict[str, Evaluation] = {}
    for precision, more in (("fp32", ""), (HALF, IN_HALF)):
        for name, side in sides.items():
            exported = open_artifact(side.exported)
            answerer = artifact_answerer(exported, RUNNERS[-1], threads=threads, precision=precision)
            tasks = [task, "answer-agreement"] if found else [task]
            found[name + more] = evaluate(answerer, data, tasks, batch=8, reference=found.get("original"))
            answerer.close()
    return found


def timings(sides: dict[str, Side], stages: tuple[str, ...], rounds: int, threads: int) -> dict[str, Any]:
    """Return latency by stage and size of every exported side, in OpenVINO also with what stayed float in bfloat16.

    `times_as_fast` compares with the original in onnxruntime, paired by round.
    """
    settings = Settings(runners=RUNNERS, precisions=("fp32", HALF), threads=threads, rounds=rounds, memory=False)
    timed = bench([str(side.exported) for side in sides.values()], settings)
    names = {side.exported.name: name for name, side in sides.items()}
    taken = [row.timing for row in timed.rows if row.timing.tower in stages]
    base = {each.tower: each.samples for each in taken if (names[each.side], each.runner) == ("original", RUNNERS[0])}
    return {
        "machine": timed.machine,
        "latency": [
            {
                "side": names[each.side] + (IN_HALF if each.runner.endswith(HALF) else ""),
                "stage": each.tower,
                "runner": each.runner,
                "p50_ms": each.latency.p50_ms.to_json(),
                "times_as_fast": compare(base[each.tower], each.samples).to_json(),
            }
            for each in taken
        ],
        "stages": {names[row.pop("target")]: row for row in timed.stages},
        "bytes": {name: open_artifact(side.exported).bytes for name, side in sides.items()},
    }
