"""The README.md beside a checkpoint in another tool's layout: what loads it, and what was rounded. Derived, never typed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mmcompress
from mmcompress.bundle import Bundle

if TYPE_CHECKING:
    from mmcompress.export.loadable import LayoutReport


def card(bundle: Bundle, report: LayoutReport) -> str:
    """Return the model card as markdown."""
    kind = type(bundle.model).__name__
    lines = [
        f"# {bundle.source.id}, quantized with mmcompress {mmcompress.__version__}, as {report.layout}",
        "",
        "```python",
        f"from transformers import {kind}",
        f'model = {kind}.from_pretrained("THIS DIRECTORY")',
        "```",
        "",
        f"Loaded by {report.loaded_by}. mmcompress is not needed.",
        "",
        "## What is stored",
        "",
        *(f"- {count} Linears: {kind}" for kind, count in report.kinds.items()),
        f"- everything else: {report.precision}",
        f"- {report.bytes} bytes of weights, {report.integer_bytes} of them those Linears'",
        "",
        "## What was rounded since mmcompress computed with it",
        "",
        *(f"- {line}" for line in rounded(report)),
        "",
        "## What was done",
        "",
        f"Original: `{bundle.source.id}` (sha256 {bundle.source.sha256[:16]}…)",
        "",
    ]
    for number, record in enumerate(bundle.history, 1):
        params = ", ".join(f"{key}={value}" for key, value in sorted(record.params.items()))
        lines.append(f"{number}. **{record.name}** {params}")
    return "\n".join(lines) + "\n"


def rounded(report: LayoutReport) -> list[str]:
    """Return, for a person, all by which the files differ from what mmcompress computes with."""
    lines = ["integers and zero points: nothing"]
    scale = f"to float16, by at most {report.scales_off:.1e} of themselves" if report.scales_off else "nothing"
    lines.append(f"scales: {scale}")
    lines.append(f"floats: to {report.precision}" if report.precision != "float32" else "floats: nothing")
    for reason in dict.fromkeys(report.floats.values()):
        own = [path for path, why in report.floats.items() if why == reason]
        more = f" and {len(own) - 1} more are" if len(own) > 1 else " is"
        lines.append(f"`{own[0]}`{more} written as floats: {reason}")
    if report.unrounded:
        lines.append(f"inputs of {len(report.unrounded)} quantized layers: not rounded to 8 bits any more")
    if report.float_outputs:
        count = len(report.float_outputs)
        lines.append(
            f"outputs of {count} query and key Linears: not rounded to 8 bits any more, logits are computed of floats"
        )
    return lines
