"""The README.md written beside the weights: what this artifact is, how to load it, what it cost. Derived, never typed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.manifest import Manifest


def write_card(manifest: Manifest, directory: Path) -> None:
    """Write README.md from the manifest."""
    (directory / "README.md").write_text(card(manifest))


def card(manifest: Manifest) -> str:
    """Return the model card as markdown."""
    lines = [f"# {manifest.source.id}, compressed with mmcompress {manifest.mmc}", ""]
    lines += ["```python", "import mmcompress", 'bundle = mmcompress.load("THIS DIRECTORY")', "```", ""]
    if manifest.plain_transformers:
        lines += [f"Plain `transformers` loads it too, {manifest.why or 'with the same outputs'}.", ""]
    else:
        lines += [f"Plain `transformers` does not give this model: {manifest.why}.", ""]
        if any(record.name == "quantize" for record in manifest.records):
            lines += [
                "`mmc export THIS DIRECTORY -o OUT --to compressed-tensors` (or `gptq`, `awq`, `onnx`) writes it as other tools "
                "load it, or says why they cannot.",
                "",
            ]
    lines += ["## What was done", "", f"Original: `{manifest.source.id}` (sha256 {manifest.source.sha256[:16]}…)", ""]
    for number, record in enumerate(manifest.records, 1):
        params = ", ".join(f"{key}={value}" for key, value in sorted(record.params.items()))
        lines.append(f"{number}. **{record.name}** {params}")
    lines += ["", *_measured(manifest.measured)]
    return "\n".join(lines).rstrip() + "\n"


def _measured(measured: dict[str, Any]) -> list[str]:
    """Markdown of the findings and of the metric table, where there are any."""
    if not measured:
        return ["Nothing was measured: no data was given.", ""]
    lines = ["## What was measured", ""]
    lines += [f"- {finding['text']}" for finding in measured.get("verdict", [])]
    metrics = measured.get("metrics", {})
    if metrics:
        lines += ["", "| metric | original | compressed |", "|---|---|---|"]
        lines += [f"| {name} | {row['original']} | {row['compressed']} |" for name, row in sorted(metrics.items())]
    return [*lines, ""]
