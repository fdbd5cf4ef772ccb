"""Sparse weights of three real models: what zeros cost in accuracy, and whether anything becomes faster or smaller for them.

    python -m bench.sparse [accuracy|speed|size] [--only dual-encoder] [--samples N] [--seeds S] [--rounds R]

Half of the weights of every Linear in the blocks of both towers of the demo's CLIP and of the dual encoder, and of the mini-VLM's
language tower, become zero: half of each row, or 2 of 4 neighbours. Nothing trains. Random choices are drawn with several seeds
and averaged sample by sample; each method is set beside those that make up for what goes as it does itself. Speed is that of the
dual encoder's vision tower, half of its weights zero (SparseGPT), in float32 and as W8A8; OpenVINO also with its option for sparse
weights, which is there for int8 on processors with AMX. Size is that of safetensors files, also gzipped.

Writes bench/results/sparse.json; what is not run keeps what was written before.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import assets
from bench.cells import write_result
from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, open_data
from mmcompress.evaluate.evaluation import Evaluation, compare, evaluate
from mmcompress.evaluate.verdict import random_findings
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.measure.latency import compare as compare_times
from mmcompress.measure.latency import interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.recipe import Step

FILE = assets.RESULTS / "sparse.json"
PATTERNS: dict[str, dict[str, Any]] = {"half of each row": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
METHODS = ("magnitude", "wanda", "sparsegpt")
RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"


@dataclass(frozen=True)
class Subject:
    """A model, the towers that become sparse, and how it is judged."""

    model: Callable[[], Path]
    towers: tuple[str, ...]
    calibration: Callable[[], str]
    held_out: Callable[[], Dataset]
    task: str
    metrics: tuple[str, ...]
    samples: int
    """How many to judge by; 0: all."""


SUBJECTS = {
    "demo CLIP": Subject(
        lambda: assets.DEMO / "clip", ("vision", "text"), lambda: "demo:train", lambda: open_data("demo:test"),
        "retrieval", ("image_to_text_r1", "text_to_image_r1"), 400,
    ),
    "dual-encoder": Subject(
        assets.dual_encoder, ("vision", "text"), lambda: str(assets.training_pairs()), lambda: open_data("demo:test"),
        "retrieval", ("image_to_text_r1", "text_to_image_r1"), 0,
    ),
    "mini-vlm": Subject(
        assets.mini_vlm, ("language",), lambda: str(assets.vqa("training")), lambda: open_data(str(assets.vqa("heldout"))),
        "vqa", ("accuracy",), 300,
    ),
}  # fmt: skip


def sparse(subject: Subject, params: dict[str, Any], seed: int = 0) -> Bundle:
    """Return the model with zeros."""
    bundle = checkpoint.load(subject.model())
    step = Step("sparsify", {"towers": list(subject.towers), **params})
    data = open_data(subject.calibration()).subset(128, 0)
    context = Context(data=data, num_samples=128, batch_size=16, seed=seed)
    pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), context)
    return bundle


def accuracy(name: str, pattern: str, samples: int, seeds: int) -> dict[str, Any]:
    """Judge every method beside random choices that are updated as it is, and SparseGPT beside Wanda."""
    subject, given = SUBJECTS[name], PATTERNS[pattern]
    held_out = subject.held_out()
    samples = samples or subject.samples
    held_out = held_out.subset(samples, 0) if samples else held_out
    original = evaluate(checkpoint.load(subject.model()), held_out, [subject.task], batch=16)

    def judged(params: dict[str, Any], seed: int = 0) -> Evaluation:
        bundle = sparse(subject, {**given, **params}, seed)
        found = evaluate(bundle, held_out, [subject.task], batch=16, reference=original)
        print(name, pattern, params, seed, json.dumps(row(found, original, subject)), flush=True)
        return found

    made = {method: judged({"method": method}) for method in METHODS}
    rivals = {
        updated: [judged({"method": "random", "update": updated}, seed) for seed in range(seeds)]
        for updated in (False, True)
    }
    rows = {method: row(each, original, subject) for method, each in made.items()}
    for method, each in made.items():
        said = random_findings(rivals[method == "sparsegpt"], each)
        rows[method]["against random"] = [finding.text for finding in said]
    against = compare(made["wanda"], made["sparsegpt"])[subject.task]
    rows["sparsegpt"]["against wanda"] = {metric: against[metric].to_json() for metric in subject.metrics}
    for updated, controls in rivals.items():
        for seed, each in enumerate(controls):
            rows[f"random{', updated' if updated else ''}, seed {seed}"] = row(each, original, subject)
    return {
        "model": name,
        "pattern": pattern,
        "towers": subject.towers,
        "n": len(held_out),
        "original": headline(original, subject),
        "rows": rows,
    }


def row(found: Evaluation, original: Evaluation, subject: Subject) -> dict[str, Any]:
    """Return the main metrics, and their paired differences from the original."""
    against = compare(original, found)[subject.task]
    return {
        **headline(found, subject),
        "difference": {metric: against[metric].to_json() for metric in subject.metrics},
    }


def headline(found: Evaluation, subject: Subject) -> dict[str, Any]:
    return {metric: found.estimates[subject.task][metric].to_json() for metric in subject.metrics}


def speed(rounds: int, work: Path) -> dict[str, Any]:
    """Time the dense vision tower and the sparse one in every runner, and OpenVINO's int8 with its option for zeros."""
    subject = SUBJECTS["dual-encoder"]
    folders = {"dense": subject.model(), "sparse": work / "sparse"}
    checkpoint.save(sparse(subject, {"sparsity": 0.5}), folders["sparse"])
    settings = Settings(
        runners=("torch", "onnxruntime", "openvino"),
        precisions=("fp32",),
        towers=("vision",),
        rounds=rounds,
        memory=False,
    )
    found = bench([str(path) for path in folders.values()], settings).to_json()
    times = [
        {key: each[key] for key in ("tower", "runner", "batch", "threads", "before_ms", "after_ms", "ratio")}
        for each in found["ratios"]
        if not each["runner"].startswith("best")
    ]
    return {"float32": times, "int8": int8_in_openvino(folders, rounds, work)}


def int8_in_openvino(folders: dict[str, Path], rounds: int, work: Path) -> dict[str, Any]:
    """Quantize both to W8A8 and time them, the sparse one with and without the option."""
    import openvino

    core, steps = openvino.Core(), {}
    used: dict[str, Any] = {}
    for side, folder in folders.items():
        bundle = checkpoint.load(folder)
        step = Step(
            "quantize", {"scheme": "W8A8", "target": "openvino", "towers": ["vision"], "sensitivity_samples": 0}
        )
        data = open_data(SUBJECTS["dual-encoder"].calibration()).subset(64, 0)
        pipeline.run_stage(
            bundle,
            pipeline.Stage(1, step, passes.build(step.name, step.params)),
            Context(data=data, num_samples=64, batch_size=16),
        )
        export_onnx(bundle, work / f"int8-{side}", towers=("vision",), batches=(1,))
        model = core.read_model(str(open_artifact(work / f"int8-{side}").path("vision")))
        given = [value.cpu().numpy() for value in bundle.example_inputs("vision", 1).values()]
        for rate in (1.0, 0.3) if side == "sparse" else (1.0,):
            options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
            compiled = core.compile_model(model, "CPU", {**options, RATE: rate})
            used[f"{side}, rate {rate:g}"] = compiled.get_property(RATE)
            request = compiled.create_infer_request()
            steps[f"{side}, rate {rate:g}"] = lambda request=request, given=given: request.infer(given)
    taken = interleaved(steps, rounds=rounds)
    return {
        name: {
            "p50_ms": samples.summary().p50_ms.to_json(),
            "times_as_fast_as_dense": compare_times(taken["dense, rate 1"], samples).to_json(),
            "rate_in_use": used[name],
        }
        for name, samples in taken.items()
    }


def size(work: Path) -> dict[str, Any]:
    """Weigh the dual encoder's file as it is and gzipped: dense, with zeros, and each as W8A16."""
    subject = SUBJECTS["dual-encoder"]
    sizes: dict[str, Any] = {}
    for name, params in {"dense": None, **PATTERNS}.items():
        for scheme in ("float32", "W8A16"):
            bundle = sparse(subject, {**params, "method": "magnitude"}) if params else checkpoint.load(subject.model())
            if scheme != "float32":
                step = Step("quantize", {"scheme": scheme})
                made = passes.build(step.name, step.params)
                pipeline.run_stage(bundle, pipeline.Stage(2, step, made), Context())
            folder = work / f"{name}-{scheme}".replace(":", "-")
            checkpoint.save(bundle, folder)
            file = folder / "model.safetensors"
            with file.open("rb") as read, gzip.open(work / "packed.gz", "wb", compresslevel=6) as written:
                shutil.copyfileobj(read, written)
            sizes[f"{name}, {scheme}"] = {"bytes": file.stat().st_size, "gzip": (work / "packed.gz").stat().st_size}
            print(name, scheme, sizes[f"{name}, {scheme}"], flush=True)
    return sizes


def record(part: str, name: str, found: dict[str, Any]) -> None:
    """Put one part's result among what the file holds by now."""
    document: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    document |= {"command": "python -m bench.sparse", "machine": machine_facts()}
    document[part] = {**document.get(part, {}), name: found} if name else found
    write_result(FILE, document)
    print(part, name, json.dumps(found, indent=1), flush=True)


def main() -> None:
    """Run what is asked for, and write the document after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["accuracy", "speed", "size", []], help="all by default")
    parser.add_argument("--only", choices=SUBJECTS, help="one of the models, for accuracy")
    parser.add_argument("--pattern", choices=PATTERNS, help="one of the patterns, for accuracy")
    parser.add_argument(
        "--samples", type=int, default=0, help="held-out samples to judge by, in place of each model's own number"
    )
    parser.add_argument("--seeds", type=int, default=3, help="random choices to average")
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each")
    options = parser.parse_args()
    parts = options.parts or ["size", "speed", "accuracy"]
    with tempfile.TemporaryDirectory() as work:
        if "size" in parts:
            record("size", "", size(Path(work)))
        if "speed" in parts:
            record("speed", "", speed(options.rounds, Path(work)))
    for name in ([options.only] if options.only else SUBJECTS) if "accuracy" in parts else ():
        for pattern in [options.pattern] if options.pattern else PATTERNS:
            record("accuracy", f"{name}, {pattern}", accuracy(name, pattern, options.samples, options.seeds))


if __name__ == "__main__":
    main()
