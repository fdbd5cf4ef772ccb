"""Linears in two factors: which directions should stay, and is it worth it? Beside random ones and beside pruning as much.

    python -m bench.low_rank [--only dual-encoder] [--samples 0] [--ratios 0.1 0.2 0.3]      writes bench/results/low_rank.json

Of the real dual encoder, Whisper tiny.en and the language model of the mini-VLM the same share of parameters goes in every way, one
shot, no training. Accuracies are paired, sample by sample: with the original, and of the default with random directions of the same
ranks and with pruning (Taylor scores, least squares). Results of models that are not measured again stay in the document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import assets
from bench.cells import read
from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, compare, evaluate
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.passes.factorize import Factorize
from mmcompress.passes.factorize_fit import Fitted, fitted
from mmcompress.recipe import Step

DEFAULT, RANDOM, PRUNE = "svd-llm", "svd-llm, random directions", "prune"
WAYS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "svd-llm, energy": {"weigh": "energy"},
    "asvd": {"method": "asvd"},
    "svd": {"method": "svd"},
    RANDOM: {"directions": "random"},
}


@dataclass(frozen=True)
class Case:
    """A model, what it is fitted to and judged on."""

    model: Callable[[], Path]
    calibration: Callable[[], Path]
    evaluation: Callable[[], str]
    task: str
    metrics: tuple[str, ...]
    towers: tuple[str, ...] = ()
    fitted_to: int = 256


CASES: dict[str, Case] = {
    "dual-encoder": Case(
        assets.dual_encoder,
        assets.training_pairs,
        lambda: "demo:test",
        "retrieval",
        ("image_to_text_r1", "text_to_image_r1"),
    ),
    "whisper": Case(
        assets.whisper_tiny,
        lambda: assets.speech("train"),
        lambda: str(assets.speech("test")),
        "transcription",
        ("word_accuracy",),
        fitted_to=64,
    ),
    "mini-vlm": Case(
        assets.mini_vlm,
        lambda: assets.vqa("training"),
        lambda: str(assets.vqa("heldout")),
        "vqa",
        ("accuracy",),
        ("language",),
        fitted_to=128,
    ),
}


def measured(case: Case, samples: int, ratios: list[float]) -> dict[str, Any]:
    """Return accuracies by ratio and way, of one model."""
    held_out = open_data(case.evaluation())
    held_out = held_out.subset(samples, 0) if samples else held_out
    calibration = open_data(str(case.calibration())).subset(case.fitted_to, 0)
    context = Context(data=calibration, num_samples=case.fitted_to, batch_size=32)
    original = evaluate(checkpoint.load(case.model()), held_out, [case.task])
    found: dict[str, dict[str, tuple[Evaluation, int, int]]] = {f"{ratio:g}": {} for ratio in ratios}

    def judge(ratio: float, way: str, bundle: Bundle, layers: int) -> None:
        judged = evaluate(bundle, held_out, [case.task], reference=original)
        found[f"{ratio:g}"][way] = (judged, cost_of(bundle).parameters, layers)
        print(ratio, way, *(judged.estimates[case.task][metric] for metric in case.metrics), flush=True)

    for way, params in WAYS.items():
        fits: dict[str, Fitted] = {}
        for ratio in ratios:
            bundle, made = checkpoint.load(case.model()), Factorize(ratio=ratio, towers=case.towers, **params)
            # What a layer can become does not depend on the ratio.
            fits = fits or fitted(made, bundle, [layer for layer in made.survey(bundle)[1] if layer.ranks], context)
            plan = made.planned(bundle, context, fits)
            made.apply(bundle, plan)
            judge(ratio, way, bundle, len(plan.decisions["ranks"]))
    for ratio in ratios:
        bundle = checkpoint.load(case.model())
        step = Step("prune", {"ratio": ratio, "towers": list(case.towers)})
        pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), context)
        judge(ratio, PRUNE, bundle, 0)
    return {
        "task": case.task,
        "n": original.n,
        "towers": list(case.towers),
        "fitted_to": case.fitted_to,
        "original": {metric: _short(original.estimates[case.task][metric].to_json()) for metric in case.metrics},
        "ratios": {ratio: _rows(case, rows) for ratio, rows in found.items()},
    }


def _rows(case: Case, rows: dict[str, tuple[Evaluation, int, int]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for way, (judged, parameters, layers) in rows.items():
        row: dict[str, Any] = {"parameters": parameters, "layers": layers}
        for metric in case.metrics:
            lost = judged.differences[case.task][metric]
            row[metric] = _short(judged.estimates[case.task][metric].to_json()) | {"lost": _short(lost.to_json())}
        table[way] = row
    for rival in (RANDOM, PRUNE):
        ahead = compare(rows[rival][0], rows[DEFAULT][0])[case.task]
        table[DEFAULT][f"against {rival}"] = {metric: _short(ahead[metric].to_json()) for metric in case.metrics}
    return table


def _short(estimate: dict[str, Any]) -> dict[str, Any]:
    return {key: round(estimate[key], 4) for key in ("value", "low", "high")}


def main() -> None:
    """Measure what was asked for and write it into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="measure this one; may be given several times")
    parser.add_argument("--samples", type=int, default=0, help="held-out samples to evaluate on; 0 means all")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    options = parser.parse_args()
    for name in options.only or CASES:
        made = measured(CASES[name], options.samples, options.ratios)
        asked = f"--only {name} --samples {options.samples} --ratios {' '.join(f'{r:g}' for r in options.ratios)}"
        document = read("low_rank") or {"models": {}}
        document["machine"] = machine_facts()
        document["models"][name] = {"command": f"python -m bench.low_rank {asked}", **made}
        (assets.RESULTS / "low_rank.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
