"""The claim about speech, measured on the real Whisper tiny.en: speed by stage, word error rate and size of `whisper-cpu`.

The fp32 original, the int8 step alone and the whole recipe are exported, answer the 200 test sentences of `bench.speech` (n and
interval of the word error rate, paired with the original's), and are timed stage by stage in one interleaved run, each in
onnxruntime and in OpenVINO: what listens, the prompt, one further token, a whole answer. The claim is about whole answers.

    python -m bench.whisper_edge [--rounds 50] [--work FOLDER]      writes bench/results/whisper_edge.json
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
from bench.edge import RECIPES, digest
from mmcompress import checkpoint, recipe
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.jobs.compress import compress
from mmcompress.measure.answerer import artifact_answerer

INT8 = {"steps": [{"quantize": {"scheme": "W8A8", "target": "cpu"}}]}
RUNNERS = ("onnxruntime", "openvino")
STAGES = ("audio", "prompt", "token", "answer")


def main() -> None:
    """Build, measure, write bench/results/whisper_edge.json and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep what is built here, and reuse it")
    parser.add_argument("--runner", dest="runners", action="append", help="default: onnxruntime and openvino")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        runners = tuple(options.runners or RUNNERS)
        result = run(work, options.rounds, options.threads, runners, options.overrides)
    (assets.RESULTS / "whisper_edge.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"speed": result["speedups"], "accuracy": result["accuracy"]}, indent=1))


def run(work: Path, rounds: int, threads: int, runners: tuple[str, ...], overrides: list[str]) -> dict[str, Any]:
    """Return everything measured; what is in `work` already is not built again."""
    model, train, test = assets.whisper_tiny(), str(assets.speech("train")), str(assets.speech("test"))
    data = [f"data.calibration={train}", f"data.evaluation={test}"]
    sources = {
        "int8": recipe.parse({**INT8, "data": {"num_samples": 64, "batch_size": 8, "evaluation_samples": 32}}, data),
        "edge": recipe.read(RECIPES / "whisper-cpu.yaml", [*data, *overrides]),
    }
    sides = {"original": work / "original-onnx"}
    if not sides["original"].exists():
        export_onnx(checkpoint.load(model), sides["original"])
    for name, made in sources.items():
        folder = work / f"{name}-{digest(made)}"
        if not folder.exists():
            compress(model, made, folder, resume=True)
        sides[name] = folder.with_name(f"{folder.name}-onnx")
        if not sides[name].exists():
            export_onnx(checkpoint.load(folder), sides[name])

    evaluations: dict[str, Evaluation] = {}
    for name, side in sides.items():
        answerer = artifact_answerer(open_artifact(side), runners[-1], threads=threads)
        tasks = ["transcription", "answer-agreement"] if evaluations else ["transcription"]
        found = evaluate(answerer, open_data(test), tasks, batch=8, reference=evaluations.get("original"))
        evaluations[name] = found
        answerer.close()
    timed = bench(
        [str(side) for side in sides.values()],
        Settings(runners=runners, threads=threads, rounds=rounds, memory=False),
    ).to_json()
    return {
        "command": f"python -m bench.whisper_edge --rounds {rounds} --threads {threads}",
        "mmc": mmcompress.__version__,
        "machine": timed["machine"],
        "recipe": sources["edge"].to_dict()["steps"],
        "accuracy": {name: found.to_json()["results"] for name, found in evaluations.items()},
        "latency_ms": [
            {key: row[key] for key in ("target", "tower", "runner", "p50_ms", "n")} for row in timed["results"]
        ],
        "speedups": speedups(timed, list(sides.values()), STAGES),
        "stages": timed["stages"],
        "bytes": {name: open_artifact(side).bytes for name, side in sides.items()},
    }


def speedups(timed: dict[str, Any], sides: list[Path], stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """By stage: every side in every runner against the original there, and best against best."""
    names = {side.name for side in sides}
    assert len(names) == len(sides), "a side's name is what its rows are found by"
    return {
        stage: {f"{row['target']}, {row['runner']}": row["ratio"] for row in timed["ratios"] if row["tower"] == stage}
        for stage in stages
    }


if __name__ == "__main__":
    main()
