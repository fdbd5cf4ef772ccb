"""What must be said of a model with zeros among its weights: how many are left, and that nothing follows from it by itself."""

from __future__ import annotations

from collections.abc import Sequence

from mmcompress.bundle import Bundle
from mmcompress.evaluate.findings import Finding
from mmcompress.manifest import Record
from mmcompress.passes.sparsify_layers import recount

LOST = 0.99
"""Share of the zeros below which some are said to be gone."""


def sparse_findings(records: Sequence[Record], bundle: Bundle) -> list[Finding]:
    """Return what to say of the zeros that the last of these passes made, as they are counted in `bundle` now."""
    made = [record for record in records if record.name == "sparsify" and record.facts]
    if not made:
        return []
    last = made[-1]
    counted = last.facts["sparsity"]
    shares = {name: (before["share"], recount(bundle, bundle.tower(name))["share"]) for name, before in counted.items()}
    later = [record.name for record in records[records.index(last) + 1 :]]
    found = [
        Finding(
            "bad",
            f"sparsify: the {name} tower has LOST zeros: {before:.1%} of its blocks' weights were zero, {now:.1%} are, "
            f"after {', '.join(later)}",
        )
        for name, (before, now) in shares.items()
        if now < LOST * before
    ]
    shown = ", ".join(f"{name} {now:.1%}" for name, (_, now) in shares.items())
    text = f"sparsify: zero weights make it NEITHER SMALLER NOR FASTER by themselves: {shown} ({last.plan['pattern']}) are zero, "
    text += "the file stores every one, and torch, onnxruntime and OpenVINO multiply them. A compressed copy is smaller"
    if last.plan["pattern"] == "2:4":
        text += "; GPUs since Ampere can skip them with kernels for 2:4, which mmc does not call"
    return [*found, Finding("bad", text)]
