"""Where a run came from, what it ran on, and how to make it again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mmcompress.jobs.report_html import Markup, join, table, tag

if TYPE_CHECKING:
    from mmcompress.jobs.report import Run


def lineage(run: Run) -> Markup:
    """Where it came from, and every pass with its parameters."""
    source, manifest = run.manifest.source, run.manifest
    facts: list[list[Any]] = [
        ["original", source.id],
        ["revision", source.revision],
        ["sha256 of its weights", source.sha256],
        ["family", manifest.family],
        ["stored as", source.dtype],
        ["seed", manifest.seed],
        ["mmc", manifest.mmc],
        ["versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())],
        [
            "plain transformers",
            "loads it" if manifest.plain_transformers else f"does not give this model: {manifest.why}",
        ],
    ]
    records = [
        [number, record.name, tag("code", json.dumps(record.params, ensure_ascii=False)), f"{record.seconds:.1f}"]
        for number, record in enumerate(manifest.records, 1)
    ]
    return join(
        [
            table(["what", "value"], [row for row in facts if row[1] not in ("", None)], left=2),
            table(["step", "pass", "parameters", "seconds"], records, left=3) if records else "",
        ]
    )


def machine(run: Run) -> Markup:
    """What the latencies were measured on."""
    facts = run.measured.get("machine", {})
    rows = [[key.replace("_", " "), fact(value)] for key, value in facts.items() if value not in (None, "", [], {})]
    return table(["what", "value"], rows, left=2) if rows else Markup("")


def reproduce(run: Run) -> Markup:
    """The resolved recipe and the command."""
    if not run.recipe:
        return Markup("")
    command = f"mmc compress {run.manifest.source.id} recipe.yaml -o OUT"
    return join([tag("pre", tag("code", command)), tag("pre", tag("code", run.recipe))])


def fact(value: Any) -> str:
    """Return a value that has parts on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
