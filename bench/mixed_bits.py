"""Is scheme auto worth it? Uniform schemes, auto and random assignments of the same bytes, on real models.

The language model of the mini-VLM answers held-out questions; the dual encoder finds held-out drawings by their captions. Random
assignments (three seeds) draw which layers get 4 bits, 8 bits or stay float within the budget that auto has; they are averaged
sample by sample. Every accuracy has n and an interval, every difference is paired.

    python -m bench.mixed_bits [--samples 160] [--seeds 3] [--only dual-encoder]      writes bench/results/mixed_bits.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import assets
from bench.cells import write_result
from mmcompress import checkpoint, passes, pipeline
from mmcompress.data import Dataset, open_data
from mmcompress.evaluate.evaluation import Evaluation, compare, evaluate
from mmcompress.evaluate.verdict import random_findings
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.recipe import Step

UNIFORM = ("W4A16", "W8A16")


@dataclass(frozen=True)
class Contest:
    """One model, the towers that are quantized and what is asked of it."""

    model: Callable[[], Path]
    towers: tuple[str, ...]
    bits: tuple[float, ...]
    calibration: Callable[[], Path]
    held_out: Callable[[], Dataset]
    task: str
    metric: str


CONTESTS = {
    # Its word table takes 8 bits and is half of its weights: fewer than 5.2 cannot be had.
    "dual-encoder": Contest(
        assets.dual_encoder,
        ("vision", "text"),
        (5.5, 6),
        assets.training_pairs,
        lambda: open_data("demo:test"),
        "retrieval",
        "image_to_text_r1",
    ),
    "mini-vlm": Contest(
        assets.mini_vlm,
        ("language",),
        (5, 6),
        lambda: assets.vqa("training"),
        lambda: open_data(str(assets.vqa("heldout"))),
        "vqa",
        "accuracy",
    ),
}


def contest(name: str, samples: int, seeds: int) -> dict[str, Any]:
    """Quantize in every way, measure, and return the rows with what is to be said of them."""
    given = CONTESTS[name]
    model = given.model()
    held_out = given.held_out()
    held_out = held_out.subset(samples, 0) if samples else held_out
    calibration = open_data(str(given.calibration())).subset(64, 0)
    original = evaluate(checkpoint.load(model), held_out, [given.task], batch=8)
    rows: dict[str, Any] = {"float": {"accuracy": score(original, given), "bytes": bytes_of(model, given)}}

    def quantized(params: dict[str, Any], seed: int = 0) -> tuple[Evaluation, dict[str, Any]]:
        bundle = checkpoint.load(model)
        step = Step("quantize", {"towers": list(given.towers), "min_cosine": -1.0, **params})
        context = Context(data=calibration, num_samples=64, batch_size=8, seed=seed)
        record = pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), context)
        found = evaluate(bundle, held_out, [given.task], reference=original, batch=8)
        towers = cost_of(bundle).towers
        row = {
            "accuracy": score(found, given),
            "against float": compare(original, found)[given.task][given.metric].to_json(),
            "bytes": sum(towers[tower].bytes for tower in given.towers),
            "cosine": {tower: record.plan["towers"][tower].get("cosine") for tower in given.towers},
            "schemes": {tower: record.plan["towers"][tower].get("schemes") for tower in given.towers},
            "seconds": record.seconds,
            **({"mixed": record.plan["mixed"]} if "mixed" in record.plan else {}),
        }
        print(name, params, json.dumps(row), flush=True)
        return found, row

    uniform = {}
    for scheme in UNIFORM:
        uniform[scheme], rows[scheme] = quantized({"scheme": scheme})
    for bits in given.bits:
        found, rows[f"auto, {bits:g} bits"] = quantized({"scheme": "auto", "bits": bits})
        controls = []
        for seed in range(seeds):
            params = {"scheme": "auto", "bits": bits, "assign": "random"}
            control, rows[f"random, {bits:g} bits, seed {seed}"] = quantized(params, seed)
            controls.append(control)
        said = [finding.to_json() for finding in random_findings(controls, found)]
        against = {
            scheme: compare(other, found)[given.task][given.metric].to_json() for scheme, other in uniform.items()
        }
        rows[f"auto, {bits:g} bits"] |= {"against random": said, "against uniform": against}
        print(json.dumps({"against random": said, "against uniform": against}), flush=True)
    return {"task": given.task, "metric": given.metric, "towers": given.towers, "rows": rows}


def score(found: Evaluation, given: Contest) -> dict[str, Any]:
    """The metric of interest with n and interval."""
    return found.estimates[given.task][given.metric].to_json()


def bytes_of(model: Path, given: Contest) -> int:
    """What the towers take before."""
    towers = cost_of(checkpoint.load(model)).towers
    return sum(towers[tower].bytes for tower in given.towers)


def main() -> None:
    """Run the contests and write the document; those not run keep what was written before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=160, help="held-out samples to evaluate on; 0 means all")
    parser.add_argument("--seeds", type=int, default=3, help="random assignments to average")
    parser.add_argument("--only", choices=CONTESTS, help="one of the models")
    options = parser.parse_args()
    file = assets.RESULTS / "mixed_bits.json"
    document: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"contests": {}}
    for name in [options.only] if options.only else CONTESTS:
        document["contests"][name] = {
            "command": f"python -m bench.mixed_bits --samples {options.samples} --seeds {options.seeds}",
            "machine": machine_facts(),
            **contest(name, options.samples, options.seeds),
        }
        write_result(file, document)


if __name__ == "__main__":
    main()
