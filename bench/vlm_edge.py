"""What quantizing and pruning do to the mini-VLM: answers by slice, speed by stage and size, each side exported.

The fp32 original, W8A8, and W8A8 after a fifth of the language model's parameters are pruned answer the held-out questions of
`bench.vqa_data` (n and intervals, paired with the original's) and are timed stage by stage in one interleaved run.

    python -m bench.vlm_edge [--rounds 30] [--questions 600] [--work FOLDER]      writes bench/results/vlm_edge.json
"""

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
from bench.whisper_edge import RUNNERS, speedups
from mmcompress import checkpoint, recipe
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.jobs.compress import compress
from mmcompress.measure.answerer import artifact_answerer

STAGES = ("vision", "prompt", "token", "answer")
INT8 = {"quantize": {"scheme": "W8A8", "target": "openvino", "sensitivity_samples": 8}}
STEPS = {
    "int8": [INT8],
    "pruned and int8": [{"prune": {"ratio": 0.2, "towers": ["language"]}}, INT8],
}


def main() -> None:
    """Build, measure, write bench/results/vlm_edge.json and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--work", type=Path, help="keep what is built here, and reuse it")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        result = run(work, options.rounds, options.threads, options.questions)
    (assets.RESULTS / "vlm_edge.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"speed": result["speedups"], "accuracy": result["accuracy"]}, indent=1))


def run(work: Path, rounds: int, threads: int, questions: int) -> dict[str, Any]:
    """Return everything measured; what is in `work` already is not built again."""
    model, data = assets.mini_vlm(), [f"data.calibration={assets.vqa('training')}"]
    sides = {"original": work / "original-onnx"}
    if not sides["original"].exists():
        export_onnx(checkpoint.load(model), sides["original"], batches=(1, 2))
    for name, steps in STEPS.items():
        made = recipe.parse({"steps": steps, "data": {"num_samples": 32, "batch_size": 8}}, data)
        folder = work / f"{name.replace(' ', '-')}-{digest(made)}"
        if not folder.exists():
            compress(model, made, folder, resume=True)
        sides[name] = folder.with_name(f"{folder.name}-onnx")
        if not sides[name].exists():
            export_onnx(checkpoint.load(folder), sides[name], batches=(1, 2))
    asked = open_data(str(assets.vqa("heldout"))).subset(questions, 0)
    evaluations: dict[str, Evaluation] = {}
    for name, side in sides.items():
        answerer = artifact_answerer(open_artifact(side), RUNNERS[-1], threads=threads)
        tasks = ["vqa", "answer-agreement"] if evaluations else ["vqa"]
        found = evaluate(answerer, asked, tasks, batch=8, reference=evaluations.get("original"))
        evaluations[name] = found
        answerer.close()
    timed = bench(
        [str(side) for side in sides.values()],
        Settings(runners=RUNNERS, threads=threads, rounds=rounds, memory=False),
    ).to_json()
    return {
        "command": f"python -m bench.vlm_edge --rounds {rounds} --threads {threads} --questions {questions}",
        "mmc": mmcompress.__version__,
        "machine": timed["machine"],
        "steps": STEPS,
        "accuracy": {name: found.to_json() for name, found in evaluations.items()},
        "latency_ms": [
            {key: row[key] for key in ("target", "tower", "runner", "p50_ms", "n")} for row in timed["results"]
        ],
        "speedups": speedups(timed, list(sides.values()), STAGES),
        "stages": timed["stages"],
        "bytes": {name: open_artifact(side).bytes for name, side in sides.items()},
    }


if __name__ == "__main__":
    main()
