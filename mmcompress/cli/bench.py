"""`mmc bench`: how fast, how large, how much memory; the first argument is what the others are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmcompress.cli import options

if TYPE_CHECKING:
    from mmcompress.jobs.bench import Bench


@click.command(
    "bench",
    epilog="\b\nExamples:\n  mmc bench MODEL OUT\n  mmc bench MODEL-onnx OUT-onnx --runner openvino --batch 8\n"
    "  mmc bench MODEL OUT --require-speedup 2 --save bench.json",
)
@click.argument("targets", metavar="A [B ...]", nargs=-1, required=True)
@click.option(
    "--runner",
    "runners",
    multiple=True,
    help="torch, onnxruntime, openvino, tensorrt, tensorrt_rtx; repeatable.  [default: all that work]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(("fp32", "bf16", "fp16")),
    help="Of the arithmetic; repeatable.  [default: as stored, and for torch also bf16 where the hardware has it]",
)
@options.tower_option
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Items per call.")
@click.option("--tokens", type=click.IntRange(2), default=16, show_default=True, help="Tokens of a text.")
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens of an answer, where models answer.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of every runner.  [default: OMP_NUM_THREADS, else every usable core]",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=100, show_default=True, help="Timed calls of each; 100 give a p99."
)
@click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Measure peak memory, each in a fresh process."
)
@click.option(
    "--require-speedup",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Exit 3 when any is less than X times as fast as A.",
)
@click.option("--save", type=click.Path(path_type=Path), help="Write the JSON document here too, for mmc check.")
@options.device_option
@options.talk_options
def command(
    targets: tuple[str, ...],
    require_speedup: float | None,
    save: Path | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Measure latency, throughput, memory and size; all timed in turn, so that the ratios hold on a busy machine.

    Every round times each once, in a new order. A turn opens with untimed calls, so that each runs as warm as in a loop of
    its own.

    Models that answer in text are timed by stage: what sees or hears, the prompt, one further token, and a whole answer.

    A and B are checkpoints (run by torch, and exported on the fly for the other runners), directories of mmc export, or
    directories with engines.
    """
    from mmcompress.checkpoint import require_device
    from mmcompress.cli import render
    from mmcompress.errors import GateFailed
    from mmcompress.jobs.bench import Settings, bench
    from mmcompress.jobs.bench import require_speedup as missed
    from mmcompress.staging import refuse_existing

    if save is not None:
        refuse_existing(save)
    require_device(settings["device"])
    terminal = render.Terminal(quiet, verbose)
    made = bench(targets, Settings(threads=threads or 0, **settings), terminal)
    reason = missed(made, require_speedup) if require_speedup else None
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(made.to_json(), indent=1, ensure_ascii=False) + "\n")
    if not as_json:
        show(made)
        for target in made.targets:
            for note in target["notes"]:
                terminal.say(f"{target['name']}: {note}")
    if reason:
        raise GateFailed(reason, hint="--save FILE keeps what was measured", document=made.to_json())
    if as_json:
        render.document(made.to_json())


def show(made: Bench) -> None:
    """Print the verdict, then the tables."""
    from mmcompress.cli import render

    render.findings([finding.to_json() for finding in made.findings()])
    ratios = {(name, speed.tower, speed.runner): speed.ratio for name, speed in made.speeds}
    first = made.targets[0]["name"]
    rows = []
    for row in made.rows:
        timing, latency = row.timing, row.timing.latency
        ratio = ratios.get((timing.side, timing.tower, timing.runner))
        rows.append(
            [
                timing.side,
                timing.tower,
                timing.runner,
                render.interval(latency.p50_ms, 2),
                *(f"{value:.2f}" if value is not None else "-" for value in (latency.p90_ms, latency.p99_ms)),
                f"{latency.throughput:,.0f}",
                render.mebibytes(row.memory.added) if row.memory else "-",
                "1" if timing.side == first else render.interval(ratio, 2) if ratio else "-",
            ]
        )
    render.table(
        f"Latency in ms, batch {made.settings.batch}, {made.machine['threads']} threads, {made.settings.rounds} rounds",
        [
            "target",
            "tower",
            "runner",
            "p50 [95%]",
            "p90",
            "p99",
            "items/s",
            "peak MiB added",
            f"times faster than {first}",
        ],
        rows,
        left=3,
    )
    towers = list(made.targets[0]["macs"])
    render.table(
        "Size",
        ["target", "kind", "MiB on disk", *(f"{tower} MMACs" for tower in towers)],
        [
            [
                t["name"],
                t["kind"],
                render.mebibytes(t["bytes"]),
                *(f"{t['macs'][n] / 1e6:,.1f}" if n in t["macs"] else "-" for n in towers),
            ]
            for t in made.targets
        ],
        left=2,
    )
    stages = [key for key in made.stages[0] if key != "target"]
    render.table(
        "Stages, ms unless named otherwise, each in its best runner",
        ["target", *(key.removesuffix("_ms").replace("_", " ") for key in stages)],
        [[row["target"], *(f"{row[key]:.2f}" if key in row else "-" for key in stages)] for row in made.stages],
    )
