"""What quantizing each group of layers alone did, from what runs recorded: rows for tables and drawings, and what to say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmcompress.evaluate.findings import Finding
from mmcompress.manifest import Record


@dataclass(frozen=True)
class Row:
    """One group of layers in one scheme."""

    tower: str
    layers: str
    scheme: str
    bytes_saved: int | None
    """Against its floats; None: not recorded."""
    loss: float
    """1 - cosine between what the tower makes of a few samples and what the float model does."""
    chosen: bool
    """Whether the layers have this scheme now."""


def judged_groups(records: Sequence[Record]) -> list[Row]:
    """Return what was judged, the worst first; float layers, which lose nothing, are left out."""
    found = []
    for record in records:
        for tower, report in record.plan.get("towers", {}).items() if record.name == "quantize" else ():
            kept = set(report.get("kept_float", []))
            options = report.get("options") or [
                {"layers": name, "scheme": report["scheme"], "loss": loss, "chosen": name not in kept}
                for name, loss in report.get("sensitivity", {}).items()
            ]
            found += [
                Row(tower, each["layers"], each["scheme"], each.get("bytes_saved"), each["loss"], each["chosen"])
                for each in options
                if each["scheme"] != "W16A16"
            ]
    return sorted(found, key=lambda row: (-row.loss, row.tower, row.layers, row.scheme))


def mixed_findings(records: Sequence[Record]) -> list[Finding]:
    """Return how scheme auto compares with one scheme for all layers, on the samples it was decided by."""
    made = []
    for record in records:
        mixed = record.plan.get("mixed", {}) if record.name == "quantize" else {}
        if "kept" not in mixed:
            continue
        budget = ", ".join(f"{key} {value:g}" for key, value in mixed["budget"].items())
        rivals = ", ".join(f"{scheme} {loss:.2e}" for scheme, loss in mixed["uniform_loss"].items())
        shown = f"1 - cosine {mixed['measured_loss']:.2e} within {budget}, for all layers {rivals or 'nothing fits'}"
        if mixed["kept"] == "auto":
            made.append(Finding("good", f"quantize: auto loses less than any one scheme for all layers: {shown}"))
        else:
            text = f"quantize: auto is NO BETTER than one scheme for all layers: {shown}; {mixed['kept']} was kept"
            made.append(Finding("bad", text))
    return made
