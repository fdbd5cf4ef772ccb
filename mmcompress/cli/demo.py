"""`mmc demo`: a newcomer's first minutes."""

from __future__ import annotations

from pathlib import Path

import click

from mmcompress.cli import options

DEFAULT = Path("out/demo")

STORY = """A small CLIP has learned to match drawings with their captions. Now it gets smaller and faster, in four steps:
  prune         cut the attention heads and neurons that matter least
  merge-tokens  let similar patches of the image travel as one
  distill       let the uncompressed model teach back what was lost
  quantize      keep weights and compute in 8 bits
Each step is measured on drawings by an artist it never saw, and beside a random choice of as much."""


@click.command("demo", epilog="\b\nExamples:\n  mmc demo\n  mmc demo -o out/half --set prune.ratio=0.5")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write; must not exist yet.  [default: out/demo, out/demo-2, …]",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the demo's recipe, such as prune.ratio=0.5."
)
@options.talk_options
def command(output: Path | None, overrides: tuple[str, ...], as_json: bool, quiet: bool, verbose: int) -> None:
    """Run the whole job on a small CLIP that comes with mmc: compress, export, time, judge, report. Works offline."""
    from mmcompress.cli import render
    from mmcompress.cli.compress import tables
    from mmcompress.errors import GateFailed
    from mmcompress.jobs.demo import demo
    from mmcompress.staging import free_name

    terminal = render.Terminal(quiet, verbose)
    for line in STORY.splitlines():
        terminal.say(line)
    try:
        made = demo(output or free_name(DEFAULT), overrides, progress=terminal)
    except GateFailed as failed:
        if failed.document and not as_json:
            tables(failed.document)
        raise
    if as_json:
        render.document({**made.result.to_json(), "report": str(made.report), "seconds": round(made.seconds, 1)})
        return
    tables(made.result.to_json())
    lines = [
        f"Done in {made.seconds:.0f} s. The compressed model and its ONNX files: {made.compressed}",
        f"The report, with plots: {made.report}",
        "Three things to try next:",
        f"  mmc inspect {made.compressed}",
        f"  mmc bench demo:clip {made.compressed}",
        f"  mmc compress demo:clip {made.compressed / 'recipe.yaml'} -o out/mine --set prune.ratio=0.4",
    ]
    for line in lines:
        render.line(line)
