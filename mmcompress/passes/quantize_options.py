"""What each group of a tower's layers may become with scheme auto: its bytes, its bits, and what it costs in accuracy alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize_fit import fit_weights
from mmcompress.passes.quantize_judge import Judge, groups_of
from mmcompress.passes.quantize_layers import candidates, group_sizes, weighed, weights_of
from mmcompress.passes.quantize_logits import pairs_of
from mmcompress.passes.quantize_plan import input_grids
from mmcompress.passes.quantize_schemes import OFF, SCHEMES, Weights
from mmcompress.progress import Progress, track
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize

BITS: dict[Weights, int] = {"int8": 8, "int4": 4}
"""Of a weight; its scales come on top."""


@dataclass(frozen=True)
class Candidate:
    """One scheme for all layers of a group."""

    scheme: str
    layers: dict[str, str]
    """Path -> the layer's scheme, which is another one where it cannot have this; empty: they stay float."""
    made: dict[str, nn.Module]
    """What takes their place."""
    bytes: int
    bits: int
    """Of all their weights together, scales not counted."""
    loss: float = 0.0
    """1 - cosine with only these layers quantized."""
    milliseconds: float = 0.0
    """What their products take, where that is asked for."""


@dataclass(frozen=True)
class Group:
    """Layers that are given one scheme, and those they may have; the last leaves them float."""

    tower: str
    name: str
    weights: int
    candidates: tuple[Candidate, ...]

    def place_of(self, scheme: str) -> int:
        """Return which candidate the group has where all have `scheme`: 8 bits where it cannot."""
        names = [candidate.scheme for candidate in self.candidates]
        return names.index(scheme if scheme in names else "W8A16")


@dataclass(frozen=True)
class Options:
    """The groups of one tower, and what was computed of samples to make them."""

    groups: list[Group]
    sizes: dict[str, int]
    """Path -> how many inputs share a scale, where it may have 4 bits."""
    tensors: dict[str, Tensor]
    logits: dict[str, str]
    """Query Linear -> key Linear whose outputs are rounded where both have W8A8."""
    smoothed: dict[str, Any]
    """How strongly W8A8 is smoothed, and what was tried."""


def options_of(settings: Quantize, bundle: Bundle, tower: Tower, schemes: Sequence[str], context: Context) -> Options:
    """Make every group of `tower` in every one of `schemes` that it may have.

    Memory: the tower once more in each scheme, in 8 and 4 bits together 0.4 of its floats.
    """
    # What experts take is not timed: they stay as they are within milliseconds.
    paths = candidates(bundle, tower, settings.tables, settings.keep_float, experts=settings.latency_ms is None)
    sizes = group_sizes(bundle, tower, paths, settings.group_size) if "W4A16" in schemes else {}
    tensors: dict[str, Tensor] = {}
    smoothed: dict[str, Any] = {}
    if "W8A8" in schemes:
        smoothed = input_grids(settings, bundle, tower, paths, SCHEMES["W8A8"], context, tensors)[1]
    pairs = pairs_of(bundle, tower, paths) if settings.rounds_logits and "W8A8" in schemes else {}
    trial = Plan({"groups": sizes, "scaled": {}, "logits": pairs}, tensors)
    fit_weights(settings, bundle, tower, dict.fromkeys(sizes, "W4A16"), context, trial)
    named = groups_of(tower, paths)
    groups = []
    for name, own in track(named.items(), context.progress, f"{tower.name} rounding", len(named)):
        made = [_quantized(settings, bundle, tower, own, scheme, trial) for scheme in schemes]
        possible = [candidate for candidate in made if candidate.scheme in candidate.layers.values()]
        weights = sum(weight.numel() for held in _weights(bundle, own).values() for weight in held)
        groups.append(Group(tower.name, name, weights, (*possible, _untouched(bundle, own))))
    return Options(groups, sizes, tensors, pairs, smoothed)


def judged(groups: Sequence[Group], judges: Mapping[str, Judge], progress: Progress) -> list[Group]:
    """Return the groups with what each candidate loses alone, by the judge of its tower."""
    shown = track(groups, progress, "sensitivity", len(groups))
    return [
        dataclasses.replace(
            group,
            candidates=tuple(
                dataclasses.replace(each, loss=1 - judges[group.tower].cosine(each.made)) if each.made else each
                for each in group.candidates
            ),
        )
        for group in shown
    ]


def _quantized(
    settings: Quantize, bundle: Bundle, tower: Tower, paths: Sequence[str], scheme: str, trial: Plan
) -> Candidate:
    can = {"W4A16": trial.decisions["groups"], "W8A8": {name.removesuffix(".scale") for name in trial.tensors}}
    layers = {path: scheme if path in can.get(scheme, paths) else "W8A16" for path in paths}
    plan = dataclasses.replace(trial, decisions={**trial.decisions, "layers": layers})
    tables = {linear: table for table, linear in tower.tied}
    made: dict[str, nn.Module] = {}
    for path in sorted(paths, key=tables.__contains__):
        made[path] = settings.maker.made(bundle.module(path), path, plan, made.get(tables.get(path, "")))
    weights = _weights(bundle, paths)
    bits = sum(BITS[SCHEMES[layers[path]].weights] * each.numel() for path, held in weights.items() for each in held)
    return Candidate(scheme, layers, made, weighed(made.values()), bits)


def _untouched(bundle: Bundle, paths: Sequence[str]) -> Candidate:
    bits = sum(8 * weight.nbytes for held in _weights(bundle, paths).values() for weight in held)
    return Candidate(OFF, {}, {}, weighed(bundle.module(path) for path in paths), bits)


def _weights(bundle: Bundle, paths: Sequence[str]) -> dict[str, list[Tensor]]:
    """Path -> the layer's weights, those that several share under the first of them."""
    found: dict[int, tuple[str, list[Tensor]]] = {}
    for path in paths:
        held = weights_of(bundle.module(path))
        found.setdefault(id(held[0]), (path, held))
    return dict(found.values())
