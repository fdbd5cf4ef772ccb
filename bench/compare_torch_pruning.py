"""Ours beside torch-pruning: units of the same tower, as many parameters, the same data, then the same training.

    python -m bench.compare_torch_pruning [--keep 0.7] [--epochs 0.5] [--rounds 40]      writes bench/results/torch_pruning.json

The vision tower of the dual encoder loses heads and neurons. torch-pruning (its pruner over all layers at once, magnitude, Taylor
and Hessian) is given one ratio for neurons and for heads, found by bisection so that it leaves as many parameters as ours;
gradients are those of the contrastive loss of 256 pairs. Ours chooses by Taylor under one budget, by the same loss, and repairs
what stays by least squares. R@1 of both directions on held-out drawings (n = 1,642), as cut and after training; every difference
is paired. What comes out is exported and timed in one interleaved run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmcompress
from bench import assets
from bench.cells import write_result
from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Sample, open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.speed import example_arrays
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runners import open_runner
from mmcompress.passes.base import Context
from mmcompress.passes.prune_units import count_costs
from mmcompress.recipe import Step
from mmcompress.views import Block, Mlp

RESULT = assets.RESULTS / "torch_pruning.json"
SAMPLES, BATCH = 256, 32
IMPORTANCES = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "hessian": "GroupHessianImportance",
}
ENGINES = ("onnxruntime", "openvino")


class Vision(nn.Module):
    """The vision tower alone, as torch-pruning wants to trace it."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.tower = bundle.model.get_submodule(bundle.tower("vision").roots[0])
        self.call = lambda pixels: bundle.encode("vision", {"pixel_values": pixels})

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (B, C)."""
        embeddings: Tensor = self.call(pixels)
        return embeddings


def losses_of(bundle: Bundle, samples: list[Sample]) -> Iterator[Tensor]:
    """Yield each picture's contrastive loss among the texts of the others: one graph each."""
    with torch.no_grad():
        texts = bundle.encode("text", bundle.prepare("text", [sample.texts[0] for sample in samples]))
        scale = bundle.dual.similarity(bundle.model)[0]
    for place, sample in enumerate(samples):
        picture = bundle.encode("vision", bundle.prepare("vision", [sample.image]))
        logits = scale * nn.functional.normalize(picture, dim=-1) @ nn.functional.normalize(texts, dim=-1).T
        yield nn.functional.cross_entropy(logits, torch.tensor([place]))


def ranked(name: str, data: Dataset) -> tuple[Bundle, Any]:
    """Return the dual encoder with the gradients that one of torch-pruning's importances asks for, and that importance."""
    import torch_pruning

    bundle = checkpoint.load(assets.dual_encoder())
    bundle.model.requires_grad_(True)
    importance = getattr(torch_pruning.importance, IMPORTANCES[name])()
    module = Vision(bundle)
    batches = [[data[i] for i in range(start, start + BATCH)] for start in range(0, SAMPLES, BATCH)]
    squares: dict[Tensor, Tensor] = {}
    for samples in batches if name != "magnitude" else []:
        for loss in losses_of(bundle, samples):
            if name == "hessian":
                module.zero_grad()
            loss.backward()
            for parameter in module.parameters() if name == "hessian" else ():
                if parameter.grad is not None:
                    squares[parameter] = squares.get(parameter, 0) + parameter.grad.square()
    if squares:
        # What its accumulate_grad would do, which in 1.6.1 forgets all samples but the last.
        importance._accu_grad, importance._counter = squares, dict.fromkeys(squares, SAMPLES)
    return bundle, importance


def theirs(bundle: Bundle, importance: Any, ratio: float) -> None:
    """Let torch-pruning take `ratio` of the vision tower's heads and neurons."""
    import torch_pruning

    module = Vision(bundle)
    blocks = bundle.tower("vision").blocks
    inner = {path for block in blocks for path in (*block.attention.writers, *_mlp(block).writers)}
    heads = {bundle.module(path): block.attention.heads for block in blocks for path in block.attention.writers}
    others = [
        m for path, m in bundle.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and path not in inner
    ]
    with warnings.catch_warnings():
        # It warns about parameters outside modules (class token, positions), which none of these units touches.
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            module,
            bundle.example_inputs("vision", 1)["pixel_values"],
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=others,
            num_heads=dict(heads),
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
            round_to=None,
        )
        pruner.step()
    for block in blocks:
        attention = block.attention
        left = bundle.module(attention.writers[0]).weight.shape[0] // attention.head_dim  # type: ignore[union-attr]
        counts = {"heads": left, "kv_heads": left, "width": left * attention.head_dim}
        for path, attribute, what in attention.bookkeeping:
            setattr(bundle.module(path), attribute, counts[what])
    bundle.model.zero_grad()


def _mlp(block: Block) -> Mlp:
    assert block.mlp is not None, f"{block.path} has no feed-forward"
    return block.mlp


def as_large(name: str, parameters: int, data: Dataset) -> Bundle:
    """Return what torch-pruning leaves that comes nearest to `parameters` in the vision tower."""
    low, high = 0.0, 0.95
    best: tuple[int, Bundle] | None = None
    found_once = ranked(name, data)
    for _ in range(7):
        ratio = (low + high) / 2
        # An importance knows the parameters it has gradients of: both are copied as one. A parameter's copy has no gradient.
        made, importance = copy.deepcopy(found_once)
        for mine, known in zip(made.model.parameters(), found_once[0].model.parameters(), strict=True):
            mine.grad = None if known.grad is None else known.grad.clone()
        theirs(made, importance, ratio)
        found = count_costs(made, made.tower("vision")).parameters
        if best is None or abs(found - parameters) < best[0]:
            best = (abs(found - parameters), made)
        low, high = (ratio, high) if found > parameters else (low, ratio)
    assert best is not None
    return best[1]


def ours(keep: float, score: str, data: Dataset) -> Bundle:
    """Return the dual encoder after `prune` left `keep` of its vision tower's parameters."""
    bundle = checkpoint.load(assets.dual_encoder())
    params = {"ratio": round(1 - keep, 4), "towers": ["vision"], "score": score, "objective": "contrastive"}
    stage = pipeline.Stage(1, Step("prune", params), passes.build("prune", params))
    pipeline.run_stage(bundle, stage, Context(data=data, num_samples=SAMPLES, batch_size=BATCH))
    return bundle


def trained(bundle: Bundle, epochs: float, data: Dataset) -> Bundle:
    """Train the vision tower towards the original."""
    params = {"epochs": epochs, "batch_size": 64, "towers": ["vision"]}
    stage = pipeline.Stage(2, Step("distill", params), passes.build("distill", params))
    context = Context(data=data, teacher=lambda: checkpoint.load(assets.dual_encoder()))
    pipeline.run_stage(bundle, stage, context)
    return bundle


def score(found: Evaluation) -> dict[str, Any]:
    """Return both directions' R@1."""
    results = found.to_json()["results"]["retrieval"]
    return {name: results[name] for name in ("image_to_text_r1", "text_to_image_r1")}


def timed(folders: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Return milliseconds at batch 1 and 8, and how many times as fast as the original each is."""
    found: dict[str, Any] = {}
    for batch in (1, 8):
        with contextlib.ExitStack() as stack:
            calls = {}
            for name, folder in folders.items():
                artifact = open_artifact(folder)
                for engine in ENGINES:
                    runner = open_runner(engine, artifact.path("vision"), 2)
                    stack.callback(runner.close)
                    calls[f"{name}, {engine}"] = runner.bind(example_arrays(artifact, "vision", batch))
            taken = interleaved(calls, rounds=rounds)
        found[f"batch {batch}"] = {
            name: {
                "p50_ms": samples.summary(batch).p50_ms.to_json(),
                "times_as_fast": compare(taken[f"original, {name.rpartition(', ')[2]}"], samples).to_json(),
            }
            for name, samples in taken.items()
        }
    return found


def main() -> None:
    """Prune, judge, train, judge, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, action="append", help="share of the tower's parameters that stays")
    parser.add_argument("--epochs", type=float, default=0.5, help="of training after it")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    keeps = options.keep or [0.7]
    data = open_data(str(assets.training_pairs()))
    held_out = open_data("demo:test")
    original = evaluate(checkpoint.load(assets.dual_encoder()), held_out, ["retrieval"])
    document: dict[str, Any] = {
        "command": "python -m bench.compare_torch_pruning "
        + " ".join(f"--keep {keep:g}" for keep in keeps)
        + f" --epochs {options.epochs:g} --rounds {options.rounds}",
        "mmc": mmcompress.__version__,
        "machine": machine_facts(2),
        "original": score(original),
        "rows": {},
    }
    chosen = data.subset(SAMPLES, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"original": Path(scratch) / "original"}
        export_onnx(checkpoint.load(assets.dual_encoder()), folders["original"], towers=["vision"], batches=(1, 8))
        for keep in keeps:
            whole = ours(keep, "taylor", chosen)
            parameters = count_costs(whole, whole.tower("vision")).parameters
            reference: dict[str, Evaluation] = {}
            for name in ("ours", *IMPORTANCES):
                bundle = whole if name == "ours" else as_large(name, parameters, chosen)
                row: dict[str, Any] = {"parameters": count_costs(bundle, bundle.tower("vision")).parameters}
                for stage in ("cut", "trained"):
                    bundle = trained(bundle, options.epochs, data) if stage == "trained" else bundle
                    found = evaluate(bundle, held_out, ["retrieval"], reference=original)
                    row[stage] = score(found)
                    if name == "ours":
                        reference[stage] = found
                    else:
                        row[stage]["ours_more"] = {
                            metric: value["difference"]
                            for metric, value in score(
                                evaluate(bundle, held_out, ["retrieval"], reference=reference[stage])
                            ).items()
                        }
                label = f"{name}, keep {keep:g}"
                folders[label] = Path(scratch) / f"{name}-{keep:g}"
                export_onnx(bundle, folders[label], towers=["vision"], batches=(1, 8))
                document["rows"][label] = row
                print(label, json.dumps(row), flush=True)
        document["latency"] = timed(folders, options.rounds)
    write_result(RESULT, document)


if __name__ == "__main__":
    main()
