"""How strongly W8A8 is smoothed where nobody says so: searched tower by tower (SmoothQuant's alpha, arXiv 2211.10438, section 4.1).

A strong one moves much of the spread of an activation's channels into the weights. It also lets every channel fill the one grid, so
that on other samples than those calibrated on more of them run over its ends. So each strength is judged on samples whose ranges
nothing was told of: a few are held back, the tower with all its layers rounded is compared with itself in floats on them, and then
they are looked at as well. A model that goes through layer by layer is not searched, since that takes one more run for each
strength, nor are ranges that are cut, which look at the samples once more for each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmcompress.bundle import Bundle
from mmcompress.ops.observers import observer
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize_calibrate import Seen, grids_of, look, nothing_seen, offers
from mmcompress.passes.quantize_judge import Judge
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize

STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)
USUAL = 0.75
"""Where none is given and none is searched: language models lose more with the paper's 0.5, and encoders little with either."""


def seen_and_strength(
    settings: Quantize, bundle: Bundle, tower: Tower, paths: list[str], outputs: list[str], context: Context
) -> tuple[Seen, float, dict[str, float]]:
    """Return what the samples showed, how strongly to smooth, and what a cosine each strength that was tried keeps."""
    seen = nothing_seen(paths, {path: observer(settings.observer, settings.percentile) for path in outputs})
    parts = None if settings.smooth is not None else _held_back(settings, bundle, tower, context)
    if parts is None:
        look(bundle, tower, seen, context)
        return seen, USUAL if settings.smooth is None else settings.smooth, {}
    few, others = parts
    look(bundle, tower, seen, others)
    judge = Judge(bundle, tower.name, few, few.num_samples)
    tried = {strength: _kept(settings, bundle, tower, seen, strength, judge, others) for strength in STRENGTHS}
    look(bundle, tower, seen, few)
    return seen, max(tried, key=lambda strength: tried[strength]), {f"{key:g}": round(tried[key], 6) for key in tried}


def _held_back(settings: Quantize, bundle: Bundle, tower: Tower, context: Context) -> tuple[Context, Context] | None:
    """Return the samples to judge on, a quarter at most, and the others; None where nothing is to be searched."""
    data = context.require_data(f"quantizing the activations of the {tower.name} tower")
    chosen = data.subset(context.num_samples, context.seed)
    count = min(settings.sensitivity_samples, len(chosen) // 4)
    if not count or bundle.in_step or settings.observer != "min-max":
        return None
    few, others = (replace(context, data=part, num_samples=len(part)) for part in chosen.apart(count, context.seed))
    can = all(offers(bundle, part, tower.name, part.num_samples) for part in (few, others))
    return (few, others) if can else None


def _kept(
    settings: Quantize, bundle: Bundle, tower: Tower, seen: Seen, strength: float, judge: Judge, context: Context
) -> float:
    """Return the cosine with all layers rounded, smoothed so strongly."""
    how: dict[str, Any] = {"method": "min-max", "percentile": settings.percentile, "smooth": strength}
    grids = grids_of(bundle, tower, seen, settings.maker.inputs, context, channels=settings.channels(tower), **how)
    tied = {linear for _, linear in tower.tied}
    made = {}
    for path, grid in grids.items():
        if path not in tied:
            trial = Plan({"layers": {path: "W8A8"}}, grid.tensors(path))
            layer = settings.maker.made(bundle.layer(path), path, trial)
            made[path] = bundle.aside(path, layer)
    return judge.cosine(made)
