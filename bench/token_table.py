"""Every way to give the mini-VLM fewer tokens of a picture, at several shares, beside random ones: answers, slices, first token.

Each is applied to the checkpoint and answers the held-out questions of `bench.vqa_data` in torch, paired with the original's
answers (n and intervals). MACs are counted anew; the time to the first token is that of the exported parts in OpenVINO, all in
one interleaved run.

    python -m bench.token_table [--questions 300] [--keep 0.5 --keep 0.25 …] [--method clusters …] [--rounds 15]

writes bench/results/token_table.json; what it holds already for the same questions is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, get_args

from bench import assets
from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.measure.cost import cost_of
from mmcompress.measure.latency import compare
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.surgery.reducing import Method

KEEPS = (0.75, 0.5, 0.25, 0.1)
METHODS: tuple[str, ...] = get_args(Method)
RESULT = assets.RESULTS / "token_table.json"
STAGES = ("vision", "prompt", "answer")


def reduced(method: str, keep: float) -> Bundle:
    """The mini-VLM with fewer tokens a picture."""
    bundle = checkpoint.load(assets.mini_vlm())
    made = passes.build("reduce-visual-tokens", {"method": method, "keep": keep})
    made.check(bundle)
    made.apply(bundle, made.plan(bundle, Context()))
    return bundle


def row(bundle: Bundle, data: Dataset, reference: Evaluation | None) -> tuple[dict[str, Any], Evaluation]:
    """What one model answers, and what it costs."""
    found = evaluate(bundle, data, ["vqa"], batch=16, reference=reference)
    cost = cost_of(bundle)
    made = {
        "accuracy": found.to_json(),
        "tokens": bundle.family.example_image_tokens(bundle.model),  # type: ignore[attr-defined]
        "language_macs": cost.towers["language"].macs,
    }
    return made, found


def timed(methods: list[str], keep: float, rounds: int) -> dict[str, Any]:
    """Milliseconds of each stage in OpenVINO and how many times as fast it is as the original's, by method."""
    with tempfile.TemporaryDirectory() as work:
        sides = {"original": Path(work) / "original"}
        export_onnx(checkpoint.load(assets.mini_vlm()), sides["original"], batches=(1,))
        for method in methods:
            sides[method] = Path(work) / method
            export_onnx(reduced(method, keep), sides[method], batches=(1,))
        settings = Settings(runners=("openvino",), precisions=("fp32",), threads=2, rounds=rounds, memory=False)
        found = bench([str(side) for side in sides.values()], settings)
    taken = [each.timing for each in found.rows if each.timing.tower in STAGES]
    base = {each.tower: each.samples for each in taken if Path(each.side).name == "original"}
    made: dict[str, Any] = {}
    for each in taken:
        made.setdefault(Path(each.side).name, {})[each.tower] = {
            "p50_ms": each.latency.p50_ms.to_json(),
            "times_as_fast": compare(base[each.tower], each.samples).to_json(),
        }
    return {"keep": keep, "machine": found.machine, "stages": made}


def main() -> None:
    """Measure what is missing, write the document, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--keep", type=float, action="append")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--rounds", type=int, default=15, help="of the timings; 0 for none")
    options = parser.parse_args()
    data = open_data(str(assets.vqa("heldout"))).subset(options.questions, 0)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    document: dict[str, Any] = {
        "command": f"python -m bench.token_table --questions {options.questions}",
        "questions": options.questions,
        "machine": machine_facts(),
        "rows": known["rows"] if known.get("questions") == options.questions else {},
        "timings": known.get("timings"),
    }
    made, original = row(checkpoint.load(assets.mini_vlm()), data, None)
    document["rows"]["original"] = made
    for keep in options.keep or KEEPS:
        for method in options.method or METHODS:
            name = f"{method} {keep:g}"
            if name not in document["rows"]:
                document["rows"][name], _ = row(reduced(method, keep), data, original)
                RESULT.write_text(json.dumps(document, indent=1) + "\n")
            print(name, json.dumps(document["rows"][name]["accuracy"]["results"]), flush=True)
    if options.rounds:
        document["timings"] = timed(list(options.method or METHODS), 0.25, options.rounds)
        print(json.dumps(document["timings"]["stages"], indent=1))
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
