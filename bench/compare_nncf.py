"""Our int8 beside NNCF's, node by node: where each rounds, what OpenVINO then computes in which precision, how fast, how exact.

The vision tower of the real dual encoder, the same calibration samples, OpenVINO with the same threads, all timed in one
interleaved run. NNCF is run with both presets: "mixed" is what it takes for transformers by itself, "performance" is symmetric
throughout. Which samples calibrate decides more about R@1 than which tool does, so accuracy is measured over several draws.

    python -m bench.compare_nncf [--rounds 200] [--work FOLDER]      writes bench/results/nncf.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import mmcompress
from bench import assets
from bench.cells import write_result
from bench.edge import OtherVision, score
from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.data import batches, open_data
from mmcompress.evaluate.evaluation import evaluate
from mmcompress.export.artifact import Artifact, open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.speed import example_arrays
from mmcompress.measure.embedder import ArtifactEmbedder
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runners import open_runner
from mmcompress.passes.base import Context
from mmcompress.passes.quantize import Quantize

SAMPLES = 128
OURS: dict[str, dict[str, Any]] = {
    "ours cpu": {"target": "cpu"},
    "ours openvino": {"target": "openvino"},
    "ours openvino, no smoothing": {"target": "openvino", "smooth": 0.0},
    "ours openvino, int8 logits": {"target": "openvino", "logits": "int8"},
}
PRESETS = ("mixed", "performance")
DRAWS = 3
PIXELS = "pixel_values"


def quantize(model: Path, data: str, seed: int = 0, **params: Any) -> Bundle:
    """Return the dual encoder with its vision tower in int8, calibrated on the samples drawn with `seed`."""
    bundle = checkpoint.load(model)
    made = Quantize(towers=("vision",), sensitivity_samples=0, **params)
    made.apply(bundle, made.plan(bundle, Context(data=open_data(data), num_samples=SAMPLES, batch_size=16, seed=seed)))
    return bundle


def nncf_quantize(original: Artifact, data: str, preset: str, out: Path, seed: int = 0) -> None:
    """Quantize the original's vision graph with NNCF: static int8, transformer settings, the same samples as ours."""
    import nncf
    import openvino

    embedder = ArtifactEmbedder(original, runner="onnxruntime")
    chosen = open_data(data).subset(SAMPLES, seed)
    pixels = [embedder.prepare_images([sample.image for sample in part])[PIXELS] for part in batches(chosen, 1)]
    made = nncf.quantize(
        openvino.Core().read_model(original.path("vision")),
        nncf.Dataset(pixels),
        subset_size=SAMPLES,
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset(preset),
    )
    openvino.save_model(made, out, compress_to_fp16=False)


def placement(file: Path) -> dict[str, int]:
    """Count what is rounded: "what makes the tensor -> what reads it", for activations."""
    import openvino

    found: Counter[str] = Counter()
    for node in openvino.Core().read_model(file).get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or node.input_value(0).get_node().get_type_name() == "Constant":
            continue
        makers = _past(node, ("Multiply", "Reshape", "Transpose"))
        readers = sorted({reader.get_type_name() for reader in _readers(node)})
        found[f"{makers} -> {'+'.join(readers)} x{len(_readers(node))}"] += 1
    return dict(sorted(found.items()))


def _past(node: Any, skipped: tuple[str, ...]) -> str:
    source = node.input_value(0).get_node()
    names = [source.get_type_name()]
    while source.get_type_name() in skipped and source.get_input_size():
        source = source.input_value(0).get_node()
        names.append(source.get_type_name())
    return " < ".join(names)


def _readers(node: Any) -> list[Any]:
    """The computing nodes behind conversions, subtracted zero points and scales."""
    readers = []
    for port in node.output(0).get_target_inputs():
        reader = port.get_node()
        passing = reader.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")
        readers += _readers(reader) if passing else [reader] * (reader.get_type_name() != "ShapeOf")
    return readers


def executed(file: Path, pixels: np.ndarray, threads: int) -> dict[str, dict[str, Any]]:
    """What OpenVINO made of it: nodes and microseconds by layer type and precision (profiled, so slower than timed)."""
    import openvino

    compiled = openvino.Core().compile_model(
        str(file),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": True,
        },
    )
    request = compiled.create_infer_request()
    rounds, spent = 30, defaultdict[str, float](float)
    for number in range(rounds + 5):
        request.infer({0: pixels})
        if number >= 5:
            for row in request.profiling_info:
                spent[row.node_name] += row.real_time.total_seconds() * 1e6 / rounds
    table: dict[str, dict[str, Any]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: value.astype(str) for key, value in node.get_rt_info().items() if key in _FACTS}
        if facts.get("layerType") in ("Const", "Input", "Output"):
            continue
        key = " ".join(facts.get(name, "") for name in _FACTS)
        row = table.setdefault(key, {"nodes": 0, "microseconds": 0.0})
        row["nodes"] += 1
        row["microseconds"] = round(row["microseconds"] + spent[node.get_friendly_name()], 1)
    return dict(sorted(table.items(), key=lambda item: -item[1]["microseconds"]))


_FACTS = ("layerType", "runtimePrecision", "outputPrecisions")


def cosines(file: Path, pixels: list[np.ndarray], wanted: np.ndarray) -> dict[str, float]:
    """Mean and lowest cosine to the fp32 embeddings, and the standard error of the mean."""
    runner = open_runner("openvino", file)
    found = np.concatenate([next(iter(runner.run({PIXELS: part}).values())).copy() for part in pixels])
    runner.close()
    similar = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    error = float(similar.std(ddof=1) / len(similar) ** 0.5)
    return {"n": len(similar), "mean": float(similar.mean()), "standard_error": error, "lowest": float(similar.min())}


def build(work: Path, model: Path, data: str) -> tuple[Artifact, dict[str, Path]]:
    """Return the fp32 artifact and the files to compare; what is in `work` is not built again."""
    if not (work / "original").exists():
        export_onnx(checkpoint.load(model), work / "original")
    original = open_artifact(work / "original")
    files = {}
    for name, params in OURS.items():
        out = work / name.replace(" ", "-").replace(",", "")
        if not out.exists():
            export_onnx(quantize(model, data, **params), out, towers=["vision"])
        files[name] = open_artifact(out).path("vision")
    for preset in PRESETS:
        files[f"nncf {preset}"] = work / f"nncf-{preset}.xml"
        if not files[f"nncf {preset}"].exists():
            nncf_quantize(original, data, preset, files[f"nncf {preset}"])
    return original, files


def accuracy(work: Path, original: Artifact, model: Path, data: str, threads: int) -> dict[str, Any]:
    """R@1 and the agreement with fp32 of both int8 vision towers, for DRAWS sets of calibration samples; n = 1,642."""
    held_out = open_data("demo:test")
    reference = evaluate(ArtifactEmbedder(original, runner="openvino", threads=threads), held_out, ["retrieval"])
    rows: dict[str, Any] = {"original": score(reference)}
    for seed in range(DRAWS):
        ours, nncf = work / f"ours-draw-{seed}", work / f"nncf-draw-{seed}.xml"
        if not ours.exists():
            export_onnx(quantize(model, data, seed, target="openvino"), ours, towers=["vision"])
        if not nncf.exists():
            nncf_quantize(original, data, "mixed", nncf, seed)
        for name, file in (("ours openvino", open_artifact(ours).path("vision")), ("nncf mixed", nncf)):
            found = evaluate(OtherVision(original, file), held_out, ["retrieval", "agreement"], reference=reference)
            rows[f"{name}, draw {seed}"] = score(found)
    return rows


def run(work: Path, rounds: int, threads: int, images: int) -> dict[str, Any]:
    """Return everything measured."""
    model, data = assets.dual_encoder(), str(assets.training_pairs())
    original, files = build(work, model, data)
    embedder = ArtifactEmbedder(original, runner="openvino", threads=threads)
    held_out = open_data("demo:test").subset(images, 0)
    pixels = [embedder.prepare_images([sample.image for sample in part])[PIXELS] for part in batches(held_out, 16)]
    wanted = np.concatenate(
        [embedder.embed_images([sample.image for sample in part]) for part in batches(held_out, 16)]
    )
    latency: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for batch in (1, 8):
        inputs = example_arrays(original, "vision", batch)
        with contextlib.ExitStack() as stack:
            steps = {}
            lanes = {"original onnxruntime": ("onnxruntime", original.path("vision"))}
            lanes |= {f"{name} openvino": ("openvino", file) for name, file in files.items()}
            lanes["ours cpu onnxruntime"] = ("onnxruntime", files["ours cpu"])
            for name, (engine, file) in lanes.items():
                runner = open_runner(engine, file, threads)
                stack.callback(runner.close)
                steps[name] = runner.bind(inputs)
            taken = interleaved(steps, rounds=rounds if batch == 1 else max(10, rounds // 4))
        latency[f"batch {batch}"] = {name: samples.summary(batch).to_json() for name, samples in taken.items()}
        ratios[f"batch {batch}"] = {
            f"{ours} against nncf {preset}": compare(
                taken[f"nncf {preset} openvino"], taken[f"{ours} openvino"]
            ).to_json()
            for ours in OURS
            for preset in PRESETS
        }
    return {
        "command": f"python -m bench.compare_nncf --rounds {rounds} --threads {threads} --images {images}",
        "mmc": mmcompress.__version__,
        "machine": machine_facts(threads),
        "placement": {name: placement(file) for name, file in files.items()},
        "executed": {name: executed(file, pixels[0][:1], threads) for name, file in files.items()},
        "cosine_to_fp32": {name: cosines(file, pixels, wanted) for name, file in files.items()},
        "accuracy": accuracy(work, original, model, data, threads),
        "latency_ms": latency,
        "times_as_fast": ratios,
    }


def main() -> None:
    """Measure, write bench/results/nncf.json, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--work", type=Path, help="keep what is built here, and reuse it")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        result = run(work, options.rounds, options.threads, options.images)
    write_result(assets.RESULTS / "nncf.json", result)
    print(json.dumps({key: result[key] for key in ("cosine_to_fp32", "times_as_fast")}, indent=1))


if __name__ == "__main__":
    main()
