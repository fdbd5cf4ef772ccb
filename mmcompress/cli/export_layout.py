"""`mmc export --to compressed-tensors|gptq|awq`: a checkpoint in another tool's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcompress.cli.render import Terminal
    from mmcompress.export.loadable import LayoutReport

NAMES = ("compressed-tensors", "gptq", "awq")


def run(model: str, output: Path, layout: str, precision: str | None, terminal: Terminal, as_json: bool) -> None:
    """Write the checkpoint and print what is in it. Raises what loading and `export_layout` raise."""
    from mmcompress import checkpoint
    from mmcompress.cli import render
    from mmcompress.export.loadable import export_layout

    report = export_layout(checkpoint.load(model), output, layout, precision=precision, progress=terminal)
    if as_json:
        render.document(document(report))
        return
    show(report)
    terminal.next_step(f"{output / 'README.md'} says what loads it, and how")


def document(report: LayoutReport) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    from dataclasses import asdict

    made = asdict(report)
    return {"output": str(made.pop("directory")), **made}


def show(report: LayoutReport) -> None:
    """Print what was written as what, and what was rounded."""
    from mmcompress.cli import render
    from mmcompress.export.loadable_card import rounded

    render.table(
        f"{report.layout}, {report.precision}",
        ["layers", "stored as", "MiB"],
        [
            *[[count, kind, ""] for kind, count in report.kinds.items()],
            [sum(report.kinds.values()), "integers and scales", render.mebibytes(report.integer_bytes)],
            [len(report.floats), "floats, though quantized", ""],
            ["", "all weight files", render.mebibytes(report.bytes)],
        ],
        left=0,
    )
    render.table("Rounded since mmcompress computed with it", ["what"], [[line] for line in rounded(report)], left=1)
