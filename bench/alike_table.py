"""Merges spread over the blocks by how alike tokens are, beside the same number in each and fewer and fewer: the real dual encoder.

DINOv2-S + MiniLM, patches merged by ToMe; R@1 on the held-out vendor's drawings, paired with the original and with the constant
schedule. How alike tokens are is seen on drawings of the training vendor alone. "similar, at once" sees that in the
model that merges nothing, where "similar" does so in the model that merges as decided, again until nothing changes.

    python -m bench.alike_table [--keep 0.5 …] [--similarity 0.8 …]       writes bench/results/alike_table.json

Rows it holds already are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from bench import assets
from bench.cells import read, write_result
from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, compare, evaluate
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import machine_facts
from mmcompress.passes import merge_alike
from mmcompress.passes.base import Context
from mmcompress.recipe import Step

RESULT = assets.RESULTS / "alike_table.json"
SCHEDULES = ("constant", "decreasing", "similar")
AT_ONCE = "similar, at once"
TASK = "retrieval"
SEEDS = 3


def merged(params: dict[str, Any], seed: int = 0) -> Bundle:
    """The dual encoder with merges, the last record of whose history says which."""
    bundle = checkpoint.load(assets.dual_encoder())
    context = Context(data=open_data("demo:train"), seed=seed)
    step = Step("merge-tokens", params)
    pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, params)), context)
    return bundle


def merged_at_once(keep: float) -> Bundle:
    """The same for schedule similar, seen in the model that merges nothing."""
    settings: Any = passes.build("merge-tokens", {"keep": keep, "schedule": "similar"})
    bundle = checkpoint.load(assets.dual_encoder())
    made, _ = merge_alike.merged_alike(
        settings, bundle, bundle.tower("vision"), Context(data=open_data("demo:train")), 1
    )
    return merged({"merged": made})


def main() -> None:
    """Measure all, write the document, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, action="append")
    parser.add_argument("--similarity", type=float, action="append")
    options = parser.parse_args()
    held_out = open_data("demo:test")
    document: dict[str, Any] = read(RESULT.stem)
    if document.get("n") != len(held_out):
        document = {
            "command": "python -m bench.alike_table",
            "n": len(held_out),
            "machine": machine_facts(),
            "rows": {},
        }
    rows = document["rows"]

    def row(name: str, bundle: Bundle, reference: Evaluation | None, **beside: Evaluation) -> Evaluation:
        found = evaluate(bundle, held_out, [TASK], batch=16, reference=reference)
        results = found.to_json()["results"][TASK]
        record = bundle.history[-1] if bundle.history else None
        rows[name] = {
            "results": {metric: results[metric] for metric in ("image_to_text_r1", "text_to_image_r1")},
            "against": {other: _differences(evaluation, found) for other, evaluation in beside.items()},
            "merged": record.plan["merged"] if record else [],
            "facts": record.facts if record else {},
            "macs": cost_of(bundle).towers["vision"].macs,
        }
        write_result(RESULT, document)
        print(
            name,
            json.dumps({key: value for key, value in rows[name].items() if key != "facts"}),
            flush=True,
        )
        return found

    original = row("original", checkpoint.load(assets.dual_encoder()), None)
    for keep in options.keep or (0.75, 0.5):
        if f"{AT_ONCE} {keep:g}" in rows:
            continue
        constant = row(f"constant {keep:g}", merged({"keep": keep}), original)
        for schedule in SCHEDULES[1:]:
            row(f"{schedule} {keep:g}", merged({"keep": keep, "schedule": schedule}), original, constant=constant)
        row(f"{AT_ONCE} {keep:g}", merged_at_once(keep), original, constant=constant)
    for similarity in options.similarity or (0.99, 0.9):
        if f"similarity {similarity:g}" in rows:
            continue
        bundle = merged({"similarity": similarity})
        share = bundle.history[-1].facts["keep"]
        constant = row(f"constant {share:g}, as similarity {similarity:g}", merged({"keep": share}), original)
        made: Any = passes.build("merge-tokens", {"similarity": similarity})
        twin = dataclasses.asdict(made.control(bundle.history[-1].plan))
        random = row(f"random, as similarity {similarity:g}", merged(twin), original)
        row(f"similarity {similarity:g}", bundle, original, constant=constant, random=random)


def _differences(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    found = compare(before, after)[TASK]
    return {metric: found[metric].to_json() for metric in ("image_to_text_r1", "text_to_image_r1")}


if __name__ == "__main__":
    main()
