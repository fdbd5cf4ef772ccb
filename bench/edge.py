"""The main claim, measured on the real DINOv2-S + MiniLM dual encoder: speed, accuracy and size of `dual-encoder-edge`.

Five vision towers are timed in one interleaved run with the same threads: the original in fp32, our int8 step alone, NNCF's int8 of
the same original, and the whole recipe, each in onnxruntime and in OpenVINO (NNCF's in OpenVINO only). R@1 is measured on what was
timed, over all of the held-out vendor's captions. "Cold" times are of single calls right after another model's.

    python -m bench.edge [--rounds 100] [--work FOLDER]      writes bench/results/edge.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import mmcompress
from bench import assets
from bench.cells import write_result
from mmcompress import checkpoint, recipe
from mmcompress.data import batches, open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import Artifact, open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.compress import compress
from mmcompress.jobs.speed import example_arrays
from mmcompress.measure.embedder import ArtifactEmbedder
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runners import open_runner

RECIPES = assets.RESULTS.parent.parent / "recipes"
INT8 = {"steps": [{"quantize": {"scheme": "W8A8", "target": "openvino"}}]}
SAMPLES = 256


def nncf_vision(original: Artifact, data: str, out: Path) -> Path:
    """Quantize the original's vision graph with NNCF (static int8, transformer preset) on the same calibration samples."""
    import nncf
    import openvino

    if out.exists():
        return out
    embedder = ArtifactEmbedder(original, runner="onnxruntime")
    pixels = []
    for samples in batches(open_data(data).subset(SAMPLES, 0), 1):
        pixels.append(embedder.prepare_images([sample.image for sample in samples])["pixel_values"])
    quantized = nncf.quantize(
        openvino.Core().read_model(original.path("vision")),
        nncf.Dataset(pixels),
        subset_size=SAMPLES,
        model_type=nncf.ModelType.TRANSFORMER,
    )
    openvino.save_model(quantized, out, compress_to_fp16=False)
    return out


class OtherVision:
    """An artifact whose vision tower is replaced by another file in a runner; preprocessing and texts stay."""

    def __init__(self, artifact: Artifact, vision: Path, runner: str = "openvino") -> None:
        self._rest = ArtifactEmbedder(artifact, runner="openvino")
        self._runner = open_runner(runner, vision)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(B, C) from the replaced tower."""
        return next(iter(self._runner.run(self._rest.prepare_images(images)).values()))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(B, C) from the artifact."""
        return self._rest.embed_texts(texts)


def score(found: Evaluation) -> dict[str, Any]:
    """R@1 and R@5 both ways, with the paired difference where there was a reference, and the agreement with it."""
    document = found.to_json()["results"]
    rows = document["retrieval"] | document.get("agreement", {})
    return {name: row for name, row in rows.items() if name.endswith(("r1", "r5", "cosine", "top1"))}


def main() -> None:
    """Build, measure, write bench/results/edge.json and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep what is built here, and reuse it")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        result = run(work, options.rounds, options.threads, options.overrides)
    write_result(assets.RESULTS / "edge.json", result)
    print(
        json.dumps(
            {"speed": result["speedups"], "r1": {k: v["image_to_text_r1"] for k, v in result["accuracy"].items()}},
            indent=1,
        )
    )


def digest(made: recipe.Recipe) -> str:
    """Eight hex digits of the resolved recipe: what was built by another one is never taken for this one's."""
    return hashlib.sha256(made.to_yaml().encode()).hexdigest()[:8]


def run(work: Path, rounds: int, threads: int, overrides: list[str]) -> dict[str, Any]:
    """Return everything measured; what is in `work` already is not built again."""
    model, train, held_out = assets.dual_encoder(), str(assets.training_pairs()), "demo:test"
    data = [f"data.calibration={train}", f"data.evaluation={held_out}"]
    sources = {
        "edge": recipe.read(RECIPES / "dual-encoder-edge.yaml", [*data, *overrides]),
        "int8": recipe.parse({**INT8, "data": {"num_samples": SAMPLES, "batch_size": 32}}, data),
    }
    if not (work / "original-onnx").exists():
        export_onnx(checkpoint.load(model), work / "original-onnx")
    folders = {name: work / f"{name}-{digest(made)}" for name, made in sources.items()}
    sides = {"original": open_artifact(work / "original-onnx")}
    for name, made in sources.items():
        artifact = folders[name].with_name(folders[name].name + "-onnx")
        if not folders[name].exists():
            compress(model, made, folders[name], resume=True)
        if not artifact.exists():
            export_onnx(checkpoint.load(folders[name]), artifact)
        sides[name] = open_artifact(artifact)
    nncf_file = nncf_vision(sides["original"], train, work / "nncf.xml")

    dataset = open_data(held_out)
    evaluations: dict[str, Evaluation] = {}
    for name, side in sides.items():
        embedder = ArtifactEmbedder(side, runner="openvino", threads=threads)
        tasks = ["retrieval", "agreement"] if evaluations else ["retrieval"]
        evaluations[name] = evaluate(embedder, dataset, tasks, reference=evaluations.get("original"))
    # NNCF was given the vision tower alone; beside it stands our int8 vision tower with the same float texts.
    for name, file in (("nncf", nncf_file), ("int8 vision", sides["int8"].path("vision"))):
        replaced = OtherVision(sides["original"], file)
        evaluations[name] = evaluate(replaced, dataset, ["retrieval", "agreement"], reference=evaluations["original"])
    beside = evaluate(replaced, dataset, ["retrieval"], reference=evaluations["nncf"])

    with contextlib.ExitStack() as stack:
        files = {
            (name, engine): side.path("vision")
            for name, side in sides.items()
            for engine in ("onnxruntime", "openvino")
        }
        files["nncf", "openvino"] = nncf_file
        timed: dict[str, Any] = {}
        for batch in (1, 8):
            inputs = example_arrays(sides["original"], "vision", batch)
            steps = {}
            for (name, engine), file in files.items():
                runner = open_runner(engine, file, threads)
                stack.callback(runner.close)
                steps[f"{name} {engine}"] = runner.bind(inputs)
            timed[f"batch {batch}"] = interleaved(steps, rounds=rounds if batch == 1 else max(10, rounds // 4))
            if batch == 1:
                timed["batch 1, cold"] = interleaved(steps, rounds=rounds, settle=0)
    return {
        "command": f"python -m bench.edge --rounds {rounds} --threads {threads}",
        "mmc": mmcompress.__version__,
        "machine": machine_facts(threads),
        "recipe": sources["edge"].to_dict()["steps"],
        "accuracy": {name: score(found) for name, found in evaluations.items()},
        "int8 vision against nncf": {
            name: row["difference"] for name, row in score(beside).items() if "difference" in row
        },
        "latency_ms": {
            batch: {name: samples.summary(int(batch[6])).to_json() for name, samples in by_name.items()}
            for batch, by_name in timed.items()
        },
        "speedups": {batch: speedups(by_name) for batch, by_name in timed.items()},
        "bytes": {
            "original": sum(file.stat().st_size for file in model.glob("*.safetensors")),
            **{
                name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                for name, folder in folders.items()
            },
            **{f"{name}-onnx": side.bytes for name, side in sides.items()},
            "nncf vision": nncf_file.with_suffix(".bin").stat().st_size,
        },
    }


def speedups(samples: dict[str, Any]) -> dict[str, Any]:
    """Each side against fp32 onnxruntime, best against best, and our int8 step against NNCF's."""
    base = samples["original onnxruntime"]
    rows = {f"{name} against original onnxruntime": compare(base, found) for name, found in samples.items()}
    best = {
        side: min(
            (name for name in samples if name.startswith(side)),
            key=lambda name: float(np.median(samples[name].seconds)),
        )
        for side in ("original", "int8", "edge")
    }
    rows[f"best: {best['edge']} against {best['original']}"] = compare(samples[best["original"]], samples[best["edge"]])
    rows["int8 openvino against nncf openvino"] = compare(samples["nncf openvino"], samples["int8 openvino"])
    rows["edge openvino against nncf openvino"] = compare(samples["nncf openvino"], samples["edge openvino"])
    return {name: estimate.to_json() for name, estimate in rows.items()}


if __name__ == "__main__":
    main()
