"""Linears in two factors: which directions should stay, and is it worth it? Beside random ones and beside pruning as much.

    python -m bench.low_rank [--only dual-encoder] [--samples 0] [--ratios 0.1 0.2 0.3]      writes bench/results/low_rank.json

Of the real dual encoder, Whisper tiny.en and the language model of the mini-VLM the same share of parameters goes in every way, one
shot, no training. Accuracies are paired, sample by sample: with the original, and of the default with random directions of the same
ranks and with pruning (Taylor scores, least squares). Results of models that are not measured again stay in the document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import assets
from bench.cells import read, write_result
from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import Evaluation, compare, evaluate
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.passes.factorize import Factorize
from mmcompress.passes.factorize_fit import Seen, fit_layer, look
from mmcompress.recipe import Step

DEFAULT, RANDOM, PRUNE = "svd-llm", "svd-llm, random directions", "prune"
WAYS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    PRUNE: {},
    RANDOM: {"directions": "random"},
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "svd-llm, energy": {"weigh": "energy"},
}
"""What is done, by a name for the table; the most telling ways first."""


@dataclass(frozen=True)
class Case:
    """A model, what it is fitted to and judged on."""

    model: Callable[[], Path]
    calibration: Callable[[], Path]
    evaluation: Callable[[], str]
    task: str
    metrics: tuple[str, ...]
    towers: tuple[str, ...] = ()
    fitted_to: int = 128


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
    ),
}


def measure(name: str, samples: int, ratios: list[float], write: Callable[[str, dict[str, Any]], None]) -> None:
    """Measure one model by ratio and way; `write` is given what there is after each."""
    case = CASES[name]
    held_out = open_data(case.evaluation())
    held_out = held_out.subset(samples, 0) if samples else held_out
    calibration = open_data(str(case.calibration())).subset(case.fitted_to, 0)
    context = Context(data=calibration, num_samples=case.fitted_to, batch_size=32)
    model = case.model()
    untouched = checkpoint.load(model)
    original = evaluate(untouched, held_out, [case.task])
    found: dict[str, dict[str, tuple[Evaluation, int, int]]] = {f"{ratio:g}": {} for ratio in ratios}

    def judge(ratio: float, way: str, bundle: Bundle, layers: int) -> None:
        judged = evaluate(bundle, held_out, [case.task], reference=original)
        found[f"{ratio:g}"][way] = (judged, cost_of(bundle).parameters, layers)
        shown = " ".join(str(judged.estimates[case.task][metric]) for metric in case.metrics)
        print(f"{name} {ratio} {way}: {shown}", flush=True)
        write(
            name,
            {
                "task": case.task,
                "n": len(held_out),
                "towers": list(case.towers),
                "fitted_to": case.fitted_to,
                "original": {
                    metric: _short(original.estimates[case.task][metric].to_json()) for metric in case.metrics
                },
                "ratios": {ratio: _rows(case, rows) for ratio, rows in found.items()},
            },
        )

    seen: dict[str, dict[str, Seen]] = {}
    for way, params in WAYS.items():
        if way == PRUNE:
            for ratio in ratios:
                bundle = checkpoint.load(model)
                step = Step("prune", {"ratio": ratio, "towers": list(case.towers)})
                pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), context)
                judge(ratio, way, bundle, 0)
            continue
        made = Factorize(towers=case.towers, **params)
        layers = [layer for layer in made.survey(untouched)[1] if layer.ranks]
        # What samples show depends on how they are weighed alone, and what a layer can become not on the ratio.
        if made.looks_at_data and made.weigh not in seen:
            seen[made.weigh] = look(made, untouched, layers, context)
        shown = seen[made.weigh] if made.looks_at_data else {}
        random = torch.Generator().manual_seed(context.seed)
        fits = {layer.path: fit_layer(made, untouched, layer, random, shown.get(layer.path)) for layer in layers}
        for ratio in ratios:
            bundle, cut = checkpoint.load(model), replace(made, ratio=ratio)
            plan = cut.planned(bundle, context, fits)
            cut.apply(bundle, plan)
            judge(ratio, way, bundle, len(plan.decisions["ranks"]))


def _rows(case: Case, rows: dict[str, tuple[Evaluation, int, int]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for way, (judged, parameters, layers) in rows.items():
        row: dict[str, Any] = {"parameters": parameters, "layers": layers}
        for metric in case.metrics:
            lost = judged.differences[case.task][metric]
            row[metric] = _short(judged.estimates[case.task][metric].to_json()) | {"lost": _short(lost.to_json())}
        table[way] = row
    for rival in [name for name in (RANDOM, PRUNE) if name in rows]:
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
    asked = f"--samples {options.samples} --ratios {' '.join(f'{ratio:g}' for ratio in options.ratios)}"

    def write(name: str, made: dict[str, Any]) -> None:
        document = read("low_rank") or {"models": {}}
        document["machine"] = machine_facts()
        document["models"][name] = {"command": f"python -m bench.low_rank --only {name} {asked}", **made}
        write_result(assets.RESULTS / "low_rank.json", document)

    for name in options.only or CASES:
        measure(name, options.samples, options.ratios, write)


if __name__ == "__main__":
    main()
