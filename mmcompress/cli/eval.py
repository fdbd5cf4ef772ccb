"""`mmc eval`: accuracy with intervals, of a checkpoint or of an exported artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmcompress.cli import options

SLICES = 12
"""Printed at most; --json has all."""


@click.command(
    "eval",
    epilog="\b\nExamples:\n  mmc eval MODEL --data demo:test\n  mmc eval OUT --data held-out/ --baseline MODEL\n"
    "  mmc eval OUT-onnx --data held-out/ --baseline MODEL --runner openvino\n"
    "  mmc eval OUT --task lm-eval:mmmu_val --baseline MODEL --num-samples 200",
)
@options.model_argument
@click.option(
    "--data", help="A folder with metadata.jsonl, tar shards, demo:test; not for tasks of lm-eval and lmms-eval."
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="retrieval, zero-shot, agreement; of a model that answers in text: transcription, vqa, captioning, perplexity, "
    "answer-agreement; repeatable. Or one of lm-eval (an extra) or lmms-eval: lm-eval:NAME, lmms-eval:NAME.  "
    "[default: all that the model and the data allow]",
)
@click.option(
    "--baseline", help="The model to compare with, sample by sample: a checkpoint, an artifact or a .npz of --save."
)
@click.option(
    "--classes", type=click.Path(path_type=Path), help="classes.json for zero-shot.  [default: beside the data]"
)
@click.option(
    "--language", help="Of transcripts, as two letters: how their words are compared.  [default: the model's, else en]"
)
@click.option("--runner", default="onnxruntime", show_default=True, help="What runs exported artifacts.")
@click.option(
    "--num-samples",
    type=click.IntRange(1),
    help="Evaluate a random subset; of lm-eval and lmms-eval the first.  [default: all]",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Samples at a time.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the subset and the intervals.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Keep every sample's value in this .npz, for later pairing."
)
@options.device_option
@options.talk_options
def command(
    model: str,
    data: str | None,
    tasks: tuple[str, ...],
    baseline: str | None,
    classes: Path | None,
    language: str | None,
    runner: str,
    num_samples: int | None,
    batch_size: int,
    seed: int,
    save: Path | None,
    device: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure accuracy: every number with its n and 95% interval, paired with --baseline sample by sample."""
    from mmcompress.cli import render
    from mmcompress.data import open_data
    from mmcompress.errors import UsageError
    from mmcompress.evaluate.store import write_evaluation
    from mmcompress.evaluate.tasks import TASKS
    from mmcompress.jobs.embedders import evaluate_target
    from mmcompress.jobs.harness import evaluate_harness, harness_task

    if save is not None:
        from mmcompress.staging import refuse_existing

        refuse_existing(save)
    terminal = render.Terminal(quiet, verbose)
    reference = None
    common: dict[str, Any] = {"runner": runner, "device": device, "seed": seed, "batch": batch_size}
    harness = harness_task(tasks)
    if harness:
        common["limit"] = num_samples
        if baseline:
            reference = evaluate_harness(baseline, harness, **common)
        found = evaluate_harness(model, harness, reference=reference, **common)
    else:
        if data is None:
            raise UsageError("there is nothing to evaluate on", hint="give --data FOLDER, or --task lm-eval:NAME")
        dataset = open_data(data, classes)
        if num_samples:
            dataset = dataset.subset(num_samples, seed)
        common |= {"dataset": dataset, "progress": terminal, "language": language}
        if baseline:
            wanted = [task for task in tasks if task not in TASKS or not TASKS[task].relative] or None
            reference = evaluate_target(baseline, tasks=wanted, **common)
        found = evaluate_target(model, tasks=tasks or None, reference=reference, **common)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        write_evaluation(found, save)
    document = found.to_json()
    if as_json:
        render.document(document)
        return
    render.table(
        f"{model} on {document['config']['data']}",
        ["task", "metric", "value [95%]", "chance", "difference [95%]"],
        [
            [
                task, metric, _value(row),
                f"{row['chance']:.4f}" if row["chance"] is not None else "", _difference(row),
            ]
            for task, by_metric in document["results"].items()
            for metric, row in by_metric.items()
        ],
        left=2,
    )  # fmt: skip
    _print_slices(document["slices"])
    _print_controls(document["controls"])
    render.findings(document["findings"])


def _print_slices(slices: list[dict[str, Any]]) -> None:
    """Print the slices that lost most, else those that score least: averages hide damage."""
    from mmcompress.cli import render

    def badness(row: dict[str, Any]) -> float:
        return float(row.get("difference", row)["value"])

    shown = sorted(slices, key=badness)[:SLICES]
    if not shown:
        return
    more = f" ({len(slices) - len(shown)} more with --json)" if len(slices) > len(shown) else ""
    render.table(
        f"slices, the worst first{more}",
        ["slice", "task", "metric", "value [95%]", "difference [95%]"],
        [[row["slice"], row["task"], row["metric"], _value(row), _difference(row)] for row in shown],
        left=3,
    )


def _print_controls(controls: list[dict[str, Any]]) -> None:
    from mmcompress.cli import render

    if controls:
        render.table(
            "controls: what is scored without looking",
            ["control", "task", "metric", "value [95%]", "lost by it [95%]"],
            [[row["control"], row["task"], row["metric"], _value(row), _difference(row, "lost")] for row in controls],
            left=3,
        )


def _value(row: dict[str, Any]) -> str:
    return f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}] n={row['n']}"


def _difference(row: dict[str, Any], key: str = "difference") -> str:
    found = row.get(key)
    if not isinstance(found, dict):
        return ""
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
