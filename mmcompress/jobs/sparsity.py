"""What must be said of a model with zeros among its weights: how many are left, and that nothing follows from it by itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.evaluate.findings import Finding
from mmcompress.ops.sparsity import Pattern
from mmcompress.passes.sparsify_layers import recount
from mmcompress.surgery.kept_zeros import zeros_of

LOST = 0.99
"""Share of the zeros below which some are said to be gone."""


def sparse_findings(bundle: Bundle, earlier: int = 0) -> list[Finding]:
    """Return what to say of the zeros that were made, as they are counted now; `earlier` passes were before this run."""
    history = bundle.history
    made = [record for record in history if record.name == "sparsify" and record.facts]
    if not made:
        return []
    counted = {name: fact["share"] for record in made for name, fact in record.facts["sparsity"].items()}
    shares = {name: (before, recount(bundle, bundle.tower(name))["share"]) for name, before in counted.items()}
    later = ", ".join(record.name for record in history[history.index(made[-1]) + 1 :])
    found = [
        f"the {name} tower has LOST zeros: {before:.1%} of its blocks' weights were zero, {now:.1%} are, after {later}"
        for name, (before, now) in shares.items()
        if now < LOST * before
    ]
    modules = dict(bundle.model.named_modules())
    for record in made:
        pattern = record.plan["pattern"]
        broken = [path for path in record.plan["zeros"] if not _follows(pattern, modules, path)]
        if broken:
            found.append(f"{broken[0]} and {len(broken) - 1} more layers are {pattern} NO MORE, after {later}")
    new = [record for record in history[earlier:] if record in made]
    if new:
        shown = ", ".join(f"{name} {now:.1%}" for name, (_, now) in shares.items())
        text = f"zero weights make it NEITHER SMALLER NOR FASTER by themselves: {shown} are zero ({new[-1].plan['pattern']}), "
        text += (
            "the file stores every one, and torch, onnxruntime and OpenVINO multiply them. A compressed copy is smaller"
        )
        if any(record.plan["pattern"] == "2:4" for record in new):
            text += "; GPUs since Ampere can skip them with kernels for 2:4, which mmc does not call"
        found.append(text)
    return [Finding("bad", f"sparsify: {text}") for text in found]


def _follows(pattern: str, modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a layer still has its zeros where N:M wants them; one that is gone does."""
    kept, _, of = pattern.partition(":")
    zero = zeros_of(modules[path]) if of and path in modules else None
    if zero is None:
        return True
    shape = Pattern.grouped(int(kept), int(of))
    return shape.fits(zero.shape[1]) and shape.holds(~zero)
