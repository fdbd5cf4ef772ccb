"""`mmc compress`: run a recipe, show what it did and what that cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mmcompress import recipe as recipes
from mmcompress.cli import options
from mmcompress.manifest import Manifest
from mmcompress.recipe import Recipe


@click.command(
    "compress",
    epilog="\b\nExamples:\n  mmc compress MODEL recipes/clip-half.yaml -o OUT\n"
    "  mmc compress MODEL recipe.yaml -o OUT --set prune.ratio=0.4 --dry-run\n"
    "  mmc compress MODEL recipe.yaml -o OUT --resume",
)
@options.model_argument
@click.argument("recipe", type=click.Path(path_type=Path))
@options.output_option()
@click.option("--data", help="Instead of the recipe's data.calibration.")
@click.option("--eval-data", help="Instead of the recipe's data.evaluation.")
@click.option("--device", help="Instead of the recipe's device.")
@options.explain_option
@options.run_options
@options.talk_options
def command(
    model: str,
    recipe: Path,
    output: Path,
    data: str | None,
    eval_data: str | None,
    device: str | None,
    overrides: tuple[str, ...],
    control: bool | None,
    **talk: Any,
) -> None:
    """Run a recipe: passes in order, measured, resumable, gates at the end."""
    named = {"data.calibration": data, "data.evaluation": eval_data, "device": device, "control": control}
    extra = [
        f"{key}={str(value).lower() if key == 'control' else value}"
        for key, value in named.items()
        if value is not None
    ]
    run_recipe(model, recipes.read(recipe, [*overrides, *extra]), output, **talk)


def run_recipe(
    model: str,
    recipe: Recipe,
    output: Path,
    *,
    dry_run: bool,
    resume: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    explain: Sequence[Path] = (),
    prompt: str = "",
) -> None:
    """Run or plan `recipe` and print what came of it; `explain`: pictures whose tokens are drawn, asking `prompt`."""
    from mmcompress.cli import render
    from mmcompress.errors import GateFailed
    from mmcompress.jobs.compress import compress, follow
    from mmcompress.jobs.estimate import estimate

    if int(os.environ.get("RANK", "0")) > 0:
        follow(model, recipe, output, allow_pickle=allow_pickle)
        return
    terminal = render.Terminal(quiet, verbose)
    if dry_run:
        planned = estimate(model, recipe, output, allow_pickle=allow_pickle, progress=terminal)
        if as_json:
            render.document(planned)
        else:
            show_plan(planned)
        return
    try:
        result = compress(
            model,
            recipe,
            output,
            resume=resume,
            allow_pickle=allow_pickle,
            progress=terminal,
            explain=explain,
            question=prompt,
        )
    except GateFailed as failed:
        if failed.document and not as_json:
            tables(failed.document)
        raise
    if as_json:
        render.document(result.to_json())
        return
    tables(result.to_json())
    why, plain = result.manifest.why, result.manifest.plain_transformers
    loads = f"plain transformers loads it too{why and f', {why}'}" if plain else why
    render.line(f"{output} is written; {loads}")
    for drawn in result.pictures:
        render.line(f"{drawn} shows which patches became one token or went")
    for command in next_steps(result.manifest, output):
        terminal.next_step(command)


def next_steps(manifest: Manifest, output: Path) -> list[str]:
    """Return what to do with the result: graphs of it, and of quantized layers other tools' layouts."""
    schemes = {
        scheme
        for record in manifest.records
        for scheme in (record.plan.get("layers", {}).values() if record.name == "quantize" else ())
    }
    if schemes & {"NF4", "FP4"}:
        return [f"mmc eval {output} --data HELD-OUT"]  # no graph and no other layout has them
    graphs = f"mmc export {output} -o {output}-onnx --to onnx"
    further = " (or gptq, awq)" if schemes & {"W4A16", "W4A8"} else ""  # they hold 4-bit integers alone
    others = f"mmc export {output} -o {output}-packed --to compressed-tensors{further}"
    return [graphs, others] if schemes else [graphs]


def show_plan(planned: dict[str, Any]) -> None:
    """Print what a run would do, and roughly what it takes."""
    from mmcompress.cli import render

    rows = [[row["step"], render.parameters(row["params"]), row["seconds"]] for row in planned["steps"]]
    render.table("Steps", ["step", "parameters", "seconds, about"], rows, left=2)
    render.line(
        f"about {planned['seconds']:,} s in all, {planned['memory_mib']:,} MiB of memory for models and training"
        + (f"; {planned['memory_free_mib']:,} MiB are available" if planned["memory_free_mib"] is not None else "")
    )
    render.line(f"about {planned['disk_mib']:,} MiB of disk while it runs; {planned['disk_free_mib']:,} MiB are free")


def tables(document: dict[str, Any]) -> None:
    """Print what ``--json`` prints, for a person: the verdict, what each step did and cost, the speed, the gates."""
    from mmcompress.cli import render
    from mmcompress.evaluate.tasks import TASKS

    render.findings(document["verdict"])
    stages = document["stages"]
    costed = [row for row in stages if "towers" in row]
    if costed:
        towers = list(costed[0]["towers"])
        render.table(
            "Steps",
            ["stage", "parameters", *(f"{tower} MMACs" for tower in towers), "MiB in memory"],
            [
                [
                    row["stage"], f"{row['parameters']:,}",
                    *(f"{row['towers'][name]['macs'] / 1e6:,.0f}" for name in towers), render.mebibytes(row["bytes"]),
                ]
                for row in costed
            ],
        )  # fmt: skip
    headlines = {f"{task.name}.{metric}" for task in TASKS.values() for metric in task.headlines}
    names = sorted(headlines & {name for row in stages for name in row.get("metrics", {})})
    if names:
        render.table(
            "Accuracy after each step [95%]",
            ["stage", *(name.replace(".", "\n") for name in names)],
            [[row["stage"], *(_interval(row["metrics"].get(name)) for name in names)] for row in stages],
        )
    if document.get("sensitivity"):
        render.table(
            "What quantizing each group of layers alone costs",
            ["tower", "layers", "scheme", "now", "MiB saved", "1 - cosine"],
            [
                [
                    row["tower"], row["layers"], row["scheme"], "yes" if row["chosen"] else "",
                    render.mebibytes(row["bytes_saved"]), f"{row['loss']:.2e}",
                ]
                for row in document["sensitivity"]
            ],
            left=4,
        )  # fmt: skip
    if document.get("split"):
        render.table(
            "How the budget was split",
            ["step", "tower", "units", "before", "after", "share removed", "parameters removed", "MMACs removed"],
            [
                [
                    row["step"], row["tower"], row["kind"], f"{row['before']:,}", f"{row['after']:,}", f"{row['share']:.3f}",
                    f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f}",
                ]
                for row in document["split"]
            ],
            left=3,
        )  # fmt: skip
    if document["speeds"]:
        render.table(
            "Speed",
            ["tower", "runner", "original ms", "compressed ms", "times faster [95%]"],
            [
                [s["tower"], s["runner"], f"{s['before_ms']:.2f}", f"{s['after_ms']:.2f}", _interval(s["ratio"], 2)]
                for s in document["speeds"]
            ],
            left=2,
        )
    for gate in document["gates"]:
        render.line(f"gate {'passed' if gate['passed'] else 'FAILED'}: {gate['text']}")


def _interval(estimate: dict[str, Any] | None, digits: int = 3) -> str:
    from mmcompress.cli import render
    from mmcompress.ops.statistics import Estimate

    return render.interval(Estimate.from_json(estimate), digits) if estimate else ""
