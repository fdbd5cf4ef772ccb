"""`mmc report`: one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from mmcompress.cli import options


@click.command(
    "report", epilog="\b\nExamples:\n  mmc report OUT -o report.html\n  mmc report OUT-30 OUT-50 -o both.html"
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.output_option()
@options.talk_options
def command(runs: tuple[Path, ...], output: Path, as_json: bool, quiet: bool, verbose: int) -> None:
    """Write one HTML page about outputs of mmc compress: verdict, accuracy against cost, evidence, how to repeat it.

    The page holds everything itself and asks no other place for anything.
    """
    from mmcompress.cli import render
    from mmcompress.jobs.report import write_report

    made = write_report(runs, output)
    if as_json:
        render.document(
            {
                "output": str(output),
                "runs": [{"name": run.name, "verdict": run.measured.get("verdict", [])} for run in made],
            }
        )
        return
    for run in made:
        if len(made) > 1:
            render.line(f"{run.name}:")
        render.findings(run.measured.get("verdict", []))
    render.line(f"written: {output}")
