"""`mmc compress`: run a recipe, show what it did and what that cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmcompress import recipe as recipes
from mmcompress.cli import options
from mmcompress.recipe import Recipe

if TYPE_CHECKING:
    from mmcompress.jobs.compress import Result


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
) -> None:
    """Run or plan `recipe` and print what came of it."""
    from mmcompress.cli import render
    from mmcompress.jobs.compress import compress, follow
    from mmcompress.jobs.estimate import estimate

    if int(os.environ.get("RANK", "0")) > 0:
        follow(model, recipe, output, allow_pickle=allow_pickle)
        return
    terminal = render.Terminal(quiet or verbose < 0)
    if dry_run:
        planned = estimate(model, recipe, output, allow_pickle=allow_pickle, progress=terminal)
        if as_json:
            render.document(planned)
        else:
            rows = [[row["step"], row["params"], row["seconds"]] for row in planned["steps"]]
            render.table("Steps", ["step", "parameters", "seconds"], rows, left=2)
            for name in ("seconds", "memory_mib", "disk_mib", "disk_free_mib"):
                render.out().print(f"{name.replace('_', ' ')}: {planned[name]:,}")
        return
    result = compress(model, recipe, output, resume=resume, allow_pickle=allow_pickle, progress=terminal)
    if as_json:
        render.document(result.to_json())
    else:
        show(result)


def show(result: Result) -> None:
    """Print the verdict, what each step did, how fast the result is, and what loads it."""
    from mmcompress.cli import render

    tables(result)
    for gate in result.gates:
        render.line(f"gate passed: {gate.text}")
    loads = "plain transformers loads it" if result.manifest.plain_transformers else f"note: {result.manifest.why}"
    render.line(f"{result.output}: {loads}")
    render.next_step(f"mmc export {result.output} -o {result.output}-onnx --to onnx")


def tables(result: Result) -> None:
    """Print the verdict, then what each step did and the speed of what was exported."""
    from mmcompress.cli import render

    render.findings([finding.to_json() for finding in result.findings])
    names = sorted({name for row in result.rows for name in row.get("metrics", {}) if name.endswith(("_r1", "top1"))})
    towers = list(result.rows[0].get("towers", {}))
    render.table(
        "Steps",
        ["stage", "parameters", *(f"{tower} MMACs" for tower in towers), "MiB in memory", *names],
        [_row(row, towers, names) for row in result.rows],
    )
    if result.speeds:
        render.table(
            "Speed",
            ["tower", "runner", "original ms", "compressed ms", "times faster [95%]"],
            [
                [s.tower, s.runner, f"{s.before_ms:.2f}", f"{s.after_ms:.2f}", render.interval(s.ratio, 2)]
                for s in result.speeds
            ],
            left=2,
        )


def _row(row: dict[str, Any], towers: list[str], names: list[str]) -> list[str]:
    metrics = row.get("metrics", {})
    cells = [
        f"{row['parameters']:,}" if "parameters" in row else "",
        *(f"{row['towers'][tower]['macs'] / 1e6:,.0f}" if "towers" in row else "" for tower in towers),
        f"{row['bytes'] / 2**20:,.1f}" if "bytes" in row else "",
    ]
    shown = [
        f"{metrics[name]['value']:.3f} [{metrics[name]['low']:.3f}, {metrics[name]['high']:.3f}]"
        if name in metrics
        else ""
        for name in names
    ]
    return [row["stage"], *cells, *shown]
