"""Ours beside every quantizer that installs: NNCF, onnxruntime's own, torchao, bitsandbytes, on one real vision tower.

The vision tower of the dual encoder; the same 128 calibration samples for whoever takes some; every tool with the settings it takes
by itself for a transformer. Each quantizes in a process of its own, whose seconds and memory are counted. R@1 is measured on what
came out (n = 1,642, paired with fp32), and all that came out is timed in one interleaved run, each in the engines that read it.
For onnxruntime the time is also taken apart by operator: the least each node took in a row of runs on one thread, which other work
on the machine does not change.

    python -m bench.compare_peers [--rounds 60] [--work FOLDER]      writes bench/results/peers.json

torchao and bitsandbytes are compared where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmcompress
from bench import assets
from bench.cells import write_result
from bench.compare_nncf import PIXELS, SAMPLES, nncf_quantize, quantize
from bench.edge import OtherVision, score
from mmcompress import checkpoint
from mmcompress.data import batches, open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import Artifact, open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.speed import example_arrays
from mmcompress.measure.embedder import ArtifactEmbedder
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.memory import peak_rss_of
from mmcompress.measure.runners import open_runner

Makes = Callable[[Path, Path], Path]
"""Quantizes into a folder, given the calibration pixels; returns the file."""
TORCH = "torch"


@dataclass(frozen=True)
class Peer:
    """One way to quantize, and where the result runs."""

    package: str
    engines: tuple[str, ...]
    make: Callable[..., Any]
    imports: tuple[str, ...] = ("torch", "transformers")


def ours(**params: Any) -> Callable[[Path, Path], Path]:
    """Through the pass and the export."""

    def make(out: Path, pixels: Path) -> Path:
        bundle = quantize(assets.dual_encoder(), str(assets.training_pairs()), **params)
        export_onnx(bundle, out / "artifact", towers=["vision"], batches=(1,))
        return open_artifact(out / "artifact").path("vision")

    return make


def by_nncf(preset: str) -> Callable[[Path, Path], Path]:
    def make(out: Path, pixels: Path) -> Path:
        nncf_quantize(open_artifact(out.parent / "original"), str(assets.training_pairs()), preset, out / "vision.xml")
        return out / "vision.xml"

    return make


class _Samples:
    """What onnxruntime's calibration reads, one after the other."""

    def __init__(self, pixels: Path) -> None:
        self._left = iter(np.load(pixels))

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample = next(self._left, None)
        return None if sample is None else {PIXELS: sample[None]}


def by_onnxruntime(how: str) -> Callable[[Path, Path], Path]:
    """Its static quantizer (all operators it knows, or products alone), its dynamic one, its 4-bit one."""

    def make(out: Path, pixels: Path) -> Path:
        from onnxruntime import quantization as tool
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source, prepared, made = out.parent / "original" / "vision.onnx", out / "prepared.onnx", out / "vision.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        if how == "dynamic":
            tool.quantize_dynamic(str(prepared), str(made), per_channel=True, weight_type=tool.QuantType.QInt8)
        elif how == "4 bits":
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            quantizer = MatMulNBitsQuantizer(str(prepared), block_size=32, is_symmetric=False, accuracy_level=4)
            quantizer.process()
            quantizer.model.save_model_to_file(str(made))
        else:
            only = {"op_types_to_quantize": ["MatMul", "Gemm", "Conv"]} if how == "products" else {}
            tool.quantize_static(
                str(prepared),
                str(made),
                _Samples(pixels),
                quant_format=tool.QuantFormat.QDQ,
                activation_type=tool.QuantType.QUInt8,
                weight_type=tool.QuantType.QInt8,
                per_channel=True,
                **only,
            )
        prepared.unlink()
        return made

    return make


def by_torchao(how: str) -> Callable[[], Any]:
    def make() -> Any:
        from torchao import quantization as tool

        bundle = checkpoint.load(assets.dual_encoder())
        configs = {
            "dynamic": tool.Int8DynamicActivationInt8WeightConfig,
            "weights": tool.Int8WeightOnlyConfig,
        }
        tool.quantize_(bundle.module("vision_model"), configs[how]())
        return bundle

    return make


def by_bitsandbytes(kind: str) -> Callable[[], Any]:
    def make() -> Any:
        import bitsandbytes

        bundle = checkpoint.load(assets.dual_encoder())
        tower = bundle.module("vision_model")
        for path, module in list(tower.named_modules()):
            if type(module) is torch.nn.Linear:
                made = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, module.bias is not None, torch.float32, quant_type=kind
                )
                made.load_state_dict(module.state_dict(), strict=False)
                owner, _, name = path.rpartition(".")
                setattr(tower.get_submodule(owner), name, made.to("cpu"))
        return bundle

    return make


PEERS = {
    "ours W8A8, cpu": Peer("", ("onnxruntime", "openvino"), ours(target="cpu")),
    "ours W8A8, openvino": Peer("", ("openvino",), ours(target="openvino")),
    "ours W8A16": Peer("", ("onnxruntime", "openvino"), ours(scheme="W8A16")),
    "ours W4A16": Peer("", ("onnxruntime", "openvino"), ours(scheme="W4A16")),
    "nncf mixed": Peer("nncf", ("openvino",), by_nncf("mixed"), ("openvino", "nncf")),
    "nncf performance": Peer("nncf", ("openvino",), by_nncf("performance"), ("openvino", "nncf")),
    "onnxruntime QDQ": Peer("onnxruntime", ("onnxruntime",), by_onnxruntime("everything"), ("onnxruntime.quantization",)),
    "onnxruntime QDQ, products": Peer(
        "onnxruntime", ("onnxruntime",), by_onnxruntime("products"), ("onnxruntime.quantization",)
    ),
    "onnxruntime dynamic": Peer("onnxruntime", ("onnxruntime",), by_onnxruntime("dynamic"), ("onnxruntime.quantization",)),
    "onnxruntime 4 bits": Peer("onnxruntime", ("onnxruntime",), by_onnxruntime("4 bits"), ("onnxruntime.quantization",)),
    "torchao int8 dynamic": Peer("torchao", (TORCH,), by_torchao("dynamic"), ("torch", "transformers", "torchao")),
    "torchao int8 weights": Peer("torchao", (TORCH,), by_torchao("weights"), ("torch", "transformers", "torchao")),
    "bitsandbytes NF4": Peer("bitsandbytes", (TORCH,), by_bitsandbytes("nf4"), ("torch", "transformers", "bitsandbytes")),
}  # fmt: skip


def make(name: str, work: str) -> dict[str, Any]:
    """Quantize as `name` does, in this process; return the file, or nothing for what lives in torch, and its bytes."""
    peer = PEERS[name]
    if peer.engines == (TORCH,):
        return {"file": None, "bytes": _bytes_in_torch(peer.make())}
    out = Path(work) / name.replace(" ", "-").replace(",", "")
    out.mkdir(exist_ok=True)
    file = peer.make(out, Path(work) / "pixels.npy")
    weights = file.with_suffix(".bin") if file.suffix == ".xml" else file
    return {"file": str(file), "bytes": weights.stat().st_size}


def _bytes_in_torch(bundle: Any) -> int:
    """What the tower takes as torch stores it: tensors of other tools do not say by their shape."""
    held = io.BytesIO()
    torch.save(bundle.module("vision_model").state_dict(), held)
    return held.getbuffer().nbytes


def nodes_of(file: Path, pixels: np.ndarray, runs: int = 30) -> dict[str, Any]:
    """Operator -> how many there are and the sum of the least microseconds each took, on one thread of onnxruntime."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.intra_op_num_threads = True, 1
        options.profile_file_prefix, options.log_severity_level = os.path.join(folder, "profile"), 4
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, {PIXELS: pixels})
        events = json.loads(Path(session.end_profiling()).read_text())
    taken, operator = defaultdict[str, list[int]](list), dict[str, str]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["name"]].append(event["dur"])
            operator[event["name"]] = event["args"]["op_name"]
    counts, least = Counter(operator.values()), Counter[str]()
    for name, durations in taken.items():
        least[operator[name]] += min(durations)
    return {kind: {"nodes": counts[kind], "microseconds": spent} for kind, spent in least.most_common()}


def scored(original: Artifact, peer: Peer, file: Path | None, reference: Evaluation) -> dict[str, Any]:
    """R@1 and agreement with fp32, in the first engine that reads the file."""
    side = peer.make() if file is None else OtherVision(original, file, peer.engines[0])
    return score(evaluate(side, open_data("demo:test"), ["retrieval", "agreement"], reference=reference))


def steps(original: Artifact, files: dict[str, Path | None], batch: int, stack: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is timed: "side, engine" and a call."""
    inputs = example_arrays(original, "vision", batch)
    lanes = {f"fp32, {engine}": (engine, original.path("vision")) for engine in ("onnxruntime", "openvino")}
    lanes |= {
        f"{name}, {engine}": (engine, file)
        for name, file in files.items()
        if file is not None
        for engine in PEERS[name].engines
    }
    for name, (engine, artifact) in lanes.items():
        runner = open_runner(engine, artifact, 2)
        stack.callback(runner.close)
        yield name, runner.bind(inputs)
    models = {"fp32": checkpoint.load(assets.dual_encoder())}
    models |= {name: PEERS[name].make() for name, file in files.items() if file is None}
    for name, bundle in models.items():
        yield f"{name}, {TORCH}", _in_torch(bundle, inputs)


def _in_torch(bundle: Any, inputs: dict[str, np.ndarray]) -> Callable[[], None]:
    held = {key: torch.from_numpy(value) for key, value in inputs.items()}

    def step() -> None:
        with torch.inference_mode():
            bundle.encode("vision", held)

    return step


def run(work: Path, rounds: int) -> dict[str, Any]:
    """Return everything measured."""
    if not (work / "original").exists():
        export_onnx(checkpoint.load(assets.dual_encoder()), work / "original")
    original = open_artifact(work / "original")
    embedder = ArtifactEmbedder(original, runner="onnxruntime")
    chosen = open_data(str(assets.training_pairs())).subset(SAMPLES, 0)
    parts = [embedder.prepare_images([s.image for s in part])[PIXELS] for part in batches(chosen, 16)]
    pixels = np.concatenate(parts)
    np.save(work / "pixels.npy", pixels)
    reference = evaluate(ArtifactEmbedder(original, runner="openvino"), open_data("demo:test"), ["retrieval"])
    sides: dict[str, Any] = {"fp32": {"accuracy": score(reference), "bytes": original.path("vision").stat().st_size}}
    files: dict[str, Path | None] = {}
    for name, peer in PEERS.items():
        if peer.package and importlib.util.find_spec(peer.package) is None:
            print(f"{name}: {peer.package} is not installed", flush=True)
            continue
        made = peak_rss_of("bench.compare_peers:make", [name, str(work)], ("bench.compare_nncf", *peer.imports))
        files[name] = file = None if made.result["file"] is None else Path(made.result["file"])
        sides[name] = {
            "bytes": made.result["bytes"],
            "seconds": round(made.seconds, 1),
            "memory_mib": round(made.added / 2**20),
            "accuracy": scored(original, peer, file, reference),
        }
        print(name, json.dumps(sides[name]), flush=True)
    readable = {"fp32": original.path("vision")} | {
        name: file for name, file in files.items() if file is not None and PEERS[name].engines[0] == "onnxruntime"
    }
    for name, file in readable.items():
        sides[name]["nodes"] = nodes_of(file, pixels[:1])
    latency: dict[str, Any] = {}
    for batch, count in ((1, rounds), (8, max(10, rounds // 4))):
        with contextlib.ExitStack() as stack:
            taken = interleaved(dict(steps(original, files, batch, stack)), rounds=count)
        first = taken["fp32, onnxruntime"]
        latency[f"batch {batch}"] = {
            name: {
                "p50_ms": samples.summary(batch).p50_ms.to_json(),
                "times_as_fast": compare(first, samples).to_json(),
            }
            for name, samples in taken.items()
        }
    return {
        "command": f"python -m bench.compare_peers --rounds {rounds}",
        "mmc": mmcompress.__version__,
        "machine": machine_facts(2),
        "sides": sides,
        "latency": latency,
    }


def main() -> None:
    """Measure, write bench/results/peers.json, print the latencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--work", type=Path, help="keep what is built here")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        result = run(work, options.rounds)
    write_result(assets.RESULTS / "peers.json", result)
    for batch, lanes in result["latency"].items():
        for name, found in lanes.items():
            print(f"{batch} {name:40} {found['p50_ms']['value']:8.2f} ms  x{found['times_as_fast']['value']:.2f}")


if __name__ == "__main__":
    main()
