"""Fewer tokens and a short training with them, on two real models: what is lost, and how much faster the exported files are.

- `vision`: recipe `dual-encoder-tokens` on DINOv2-S + MiniLM: the vision tower in onnxruntime and OpenVINO, R@1 of all held-out
  drawings measured on the exported files. The same with int8 weights and activations stands beside it, and recipe
  `dual-encoder-small`, which prunes as well.
- `answers`: recipe `vlm-tokens` on the mini-VLM, which trains nothing: a quarter of a picture's tokens, time to the first token,
  held-out questions by slice. Beside it stands a tenth of them.

    python -m bench.token_edge [vision | answers] [--rounds 50] [--work FOLDER]     writes bench/results/token_edge.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import assets
from bench.answer_sides import RUNNERS, Side, build, compressed, parser, workplace
from bench.cells import read, write_result
from bench.edge import INT8, RECIPES, nncf_vision, score
from bench.token_table import timed_sides
from mmcompress import checkpoint, recipe
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.speed import example_arrays
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.measure.embedder import ArtifactEmbedder
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runners import open_runner
from mmcompress.recipe import Recipe

RESULT = assets.RESULTS / "token_edge.json"
QUESTIONS = 600
DISTILLED = "fewer tokens distilled"
SMALL = "pruned too, distilled and int8"


def trained_and_not() -> dict[str, Recipe]:
    """The dual encoder's recipe, and its first step alone."""
    given = [f"data.calibration={assets.training_pairs()}", "data.evaluation=demo:test"]
    whole = recipe.read(RECIPES / "dual-encoder-tokens.yaml", given)
    return {"fewer tokens": replace(whole, steps=whole.steps[:1], gates=recipe.Gates()), DISTILLED: whole}


def with_int8(work: Path, sides: dict[str, Side], of: Recipe) -> None:
    """Add the distilled side with int8 weights and activations."""
    made = replace(of, steps=recipe.parse(INT8).steps, gates=recipe.Gates())
    before = sides[DISTILLED].checkpoint
    folder = compressed(work, before, f"{before.name} and int8", made)
    sides["distilled and int8"] = Side(folder, folder.with_name(f"{folder.name}-onnx"))
    if not sides["distilled and int8"].exported.exists():
        export_onnx(checkpoint.load(folder), sides["distilled and int8"].exported, batches=(1, 2))


def vision(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build, judge and time the dual encoder."""
    recipes = trained_and_not()
    sides = build(work, assets.dual_encoder(), recipes)
    with_int8(work, sides, recipes[DISTILLED])
    small = recipe.read(
        RECIPES / "dual-encoder-small.yaml",
        [f"data.calibration={assets.training_pairs()}", "data.evaluation=demo:test"],
    )
    sides |= build(work, assets.dual_encoder(), {SMALL: small})
    found: dict[str, Evaluation] = {}
    for name, side in sides.items():
        embedder = ArtifactEmbedder(open_artifact(side.exported), runner="openvino", threads=options.threads)
        tasks = ["retrieval", "agreement"] if found else ["retrieval"]
        found[name] = evaluate(embedder, open_data("demo:test"), tasks, reference=found.get("original"))
        embedder.close()
    return {
        "accuracy": {name: score(one) for name, one in found.items()},
        **timed_towers(work, sides, options),
        "steps": recipes[DISTILLED].to_dict()["steps"],
        "steps of the smallest": small.to_dict()["steps"],
    }


def timed_towers(work: Path, sides: dict[str, Side], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every vision tower in both engines, NNCF's int8 of the original among them, all in turn."""
    original = open_artifact(sides["original"].exported)
    files = {
        (name, engine): open_artifact(side.exported).path("vision")
        for name, side in sides.items()
        for engine in RUNNERS
    }
    files["int8 by NNCF", RUNNERS[1]] = nncf_vision(original, str(assets.training_pairs()), work / "nncf.xml")
    rows: dict[str, Any] = {}
    machine = machine_facts(options.threads)
    for batch in (1, 8):
        with contextlib.ExitStack() as stack:
            steps = {}
            for (name, engine), file in files.items():
                runner = open_runner(engine, file, options.threads)
                stack.callback(runner.close)
                steps[f"{name}, {engine}"] = runner.bind(example_arrays(original, "vision", batch))
            taken = interleaved(steps, rounds=options.rounds)
        for name, engine in files:
            own = taken[f"{name}, {engine}"]
            rows.setdefault(name, []).append(
                {
                    "stage": "vision",
                    "runner": engine,
                    "batch": batch,
                    "p50_ms": own.summary(batch).p50_ms.to_json(),
                    "times_as_fast": compare(taken[f"original, {engine}"], own).to_json(),
                    "against fp32 onnxruntime": compare(taken[f"original, {RUNNERS[0]}"], own).to_json(),
                    "against nncf": compare(taken[f"int8 by NNCF, {RUNNERS[1]}"], own).to_json(),
                }
            )
    return {"machine": machine, "sides": rows}


def answers(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build, judge and time the mini-VLM."""
    held_out = str(assets.vqa("heldout"))
    given = [f"data.evaluation={held_out}"]
    recipes = {
        "a quarter": recipe.read(RECIPES / "vlm-tokens.yaml", given),
        "a tenth": recipe.read(RECIPES / "vlm-tokens.yaml", [*given, "reduce-visual-tokens.keep=0.1"]),
    }
    sides = build(work, assets.mini_vlm(), recipes)
    data = open_data(held_out).subset(QUESTIONS, 0)
    found: dict[str, Evaluation] = {}
    for name, side in sides.items():
        answerer = artifact_answerer(open_artifact(side.exported), "openvino", threads=options.threads)
        found[name] = evaluate(answerer, data, ["vqa"], batch=8, reference=found.get("original"))
        answerer.close()
    exported = {name: side.exported for name, side in sides.items()}
    return {
        "accuracy": {name: one.to_json() for name, one in found.items()},
        **timed_sides(exported, ("vision", "prompt", "token", "answer"), (1,), options.rounds),
        "steps": recipes["a quarter"].to_dict()["steps"],
    }


PARTS = {"vision": vision, "answers": answers}


def main() -> None:
    """Measure one part or both, write bench/results/token_edge.json and print it."""
    options = parser(__doc__, rounds=50)
    options.add_argument("part", nargs="?", choices=PARTS)
    chosen = options.parse_args()
    document = read(RESULT.stem)
    with workplace(chosen) as work:
        for name in [chosen.part] if chosen.part else PARTS:
            (work / name).mkdir(exist_ok=True)
            document[name] = {
                "command": f"python -m bench.token_edge {name} --rounds {chosen.rounds}",
                **PARTS[name](work / name, chosen),
            }
            write_result(RESULT, document)
            print(json.dumps({key: document[name][key] for key in ("accuracy", "sides")}, indent=1))


if __name__ == "__main__":
    main()
