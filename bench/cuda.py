"""Towers of CLIP ViT-B/16 size on a CUDA device: pruned, merged and in half precision, beside the uncompressed model.

Random weights: speed and memory only, nothing about accuracy. Baselines are fp32 and the device's best plain precisions.

    python -m bench.cuda --output bench/results/cuda.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from bench.cells import write_result
from mmcompress import passes, pipeline
from mmcompress.bundle import Bundle, Processor
from mmcompress.errors import MissingError
from mmcompress.families import FAMILIES
from mmcompress.manifest import Source
from mmcompress.measure.cost import cost_of
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.recipe import Step

STEPS: dict[str, list[Step]] = {
    "original": [],
    "pruned 30%": [Step("prune", {"ratio": 0.3, "score": "magnitude", "compensate": "none"})],
    "merged keep 0.5": [Step("merge-tokens", {"keep": 0.5})],
    "both": [
        Step("prune", {"ratio": 0.3, "score": "magnitude", "compensate": "none"}),
        Step("merge-tokens", {"keep": 0.5}),
    ],
}
BATCHES = (1, 32)


def vit_b16() -> Bundle:
    """CLIP ViT-B/16 with random weights, on the CPU."""
    torch.manual_seed(0)
    vision = {"patch_size": 16}
    model = CLIPModel(CLIPConfig(vision_config=vision)).eval()
    return Bundle(model, Processor(), FAMILIES["clip"], Source("clip-vit-base-patch16, random weights"))


def compressed(steps: list[Step]) -> Bundle:
    """Return the model after `steps`, which need no data."""
    bundle = vit_b16()
    for number, step in enumerate(steps, 1):
        pipeline.run_stage(bundle, pipeline.Stage(number, step, passes.build(step.name, step.params)), Context())
    return bundle


def step_of(bundle: Bundle, batch: int) -> Callable[[], None]:
    """Return a step that encodes `batch` images and waits for the device."""
    inputs = bundle.example_inputs("vision", batch)
    dtype = next(bundle.model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    @torch.inference_mode()
    def run() -> None:
        bundle.encode("vision", inputs)
        torch.cuda.synchronize()

    return run


def main() -> None:
    """Time every variant in every precision, interleaved, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise MissingError("bench.cuda needs a CUDA device", hint="mmc doctor shows why torch sees none")
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        steps, costs = {}, {}
        for precision in (torch.float32, torch.bfloat16, torch.float16):
            for name, todo in STEPS.items():
                bundle = compressed(todo)
                costs[name] = cost_of(bundle).to_json()
                bundle.model.to("cuda", precision)
                steps[f"{name}, {str(precision)[6:]}"] = step_of(bundle, batch)
        samples = interleaved(steps, rounds=options.rounds, warmup=10)
        for name, found in samples.items():
            variant, precision_name = name.split(", ")
            rows.append(
                {
                    "variant": variant,
                    "precision": precision_name,
                    "batch": batch,
                    "latency": found.summary(batch).to_json(),
                    "times_faster_than_fp32": compare(samples["original, float32"], found).to_json(),
                    "times_faster_than_same_precision": compare(
                        samples[f"original, {precision_name}"], found
                    ).to_json(),
                    "vision_macs": costs[variant]["towers"]["vision"]["macs"],
                }
            )
    document = {"command": "bench/gpu.sh", "machine": machine_facts(), "rows": rows}
    write_result(options.output, document)
    for row in rows:
        ratio = row["times_faster_than_same_precision"]
        what = f"{row['variant']:>16} {row['precision']:>9} batch {row['batch']:>3}"
        print(f"{what}: x{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")


if __name__ == "__main__":
    main()
