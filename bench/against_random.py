"""Does pruning beat random pruning, and merging beat random dropping? On the real dual encoder, with paired intervals.

    python -m bench.against_random [--samples 0] [--seeds 3]      writes bench/results/against_random.json

Pruning removes 30% of the parameters of both towers' blocks, one shot, no training; every score is repaired the same way, so that
only the selection differs. Merging keeps half of the token work. Random selections are drawn with several seeds and averaged
sample by sample.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import assets
from bench.cells import write_result
from mmcompress import checkpoint, passes, pipeline
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.evaluate.verdict import random_findings
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.recipe import Step

PRUNE = {"ratio": 0.3, "compensate": "none"}
REPAIRED = {"ratio": 0.3, "compensate": "least-squares"}
CONTESTS: dict[str, tuple[dict[str, Step], Step]] = {
    "prune 30% of parameters": (
        {score: Step("prune", {**PRUNE, "score": score}) for score in ("taylor", "activation", "magnitude")},
        Step("prune", {**PRUNE, "score": "random"}),
    ),
    "prune 30% of parameters, least squares": (
        {score: Step("prune", {**REPAIRED, "score": score}) for score in ("taylor", "activation")},
        Step("prune", {**REPAIRED, "score": "random"}),
    ),
    "merge tokens, keep 0.5": (
        {"tome": Step("merge-tokens", {"keep": 0.5})},
        Step("merge-tokens", {"keep": 0.5, "method": "random"}),
    ),
}


def main() -> None:
    """Run every contest, write the document, print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=0, help="held-out drawings to evaluate on; 0 means all")
    parser.add_argument("--seeds", type=int, default=3, help="random selections to average")
    options = parser.parse_args()
    model = assets.dual_encoder()
    calibration = open_data(assets.training_pairs())
    held_out = open_data("demo:test")
    held_out = held_out.subset(options.samples, 0) if options.samples else held_out
    original = evaluate(checkpoint.load(model), held_out, ["retrieval"])

    def measured(step: Step, seed: int = 0) -> tuple[Evaluation, int]:
        bundle = checkpoint.load(model)
        context = Context(data=calibration.subset(256, 0), num_samples=256, batch_size=32, seed=seed)
        pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), context)
        return evaluate(bundle, held_out, ["retrieval"], reference=original), cost_of(bundle).parameters

    document: dict[str, Any] = {
        "command": f"python -m bench.against_random --samples {options.samples} --seeds {options.seeds}",
        "machine": machine_facts(),
        "original": original.to_json()["results"]["retrieval"],
        "contests": {},
    }
    for name, (rivals, random) in CONTESTS.items():
        controls = [measured(random, seed) for seed in range(options.seeds)]
        rows: dict[str, Any] = {
            f"random, seed {seed}": {**control.to_json()["results"]["retrieval"], "parameters": parameters}
            for seed, (control, parameters) in enumerate(controls)
        }
        findings = {}
        for score, step in rivals.items():
            found, parameters = measured(step)
            rows[score] = {**found.to_json()["results"]["retrieval"], "parameters": parameters}
            findings[score] = [f.to_json() for f in random_findings([control for control, _ in controls], found)]
            print(name, score, *(f["text"] for f in findings[score]), sep="\n  ", flush=True)
        document["contests"][name] = {"rows": rows, "findings": findings}
    write_result(assets.RESULTS / "against_random.json", document)


if __name__ == "__main__":
    main()
