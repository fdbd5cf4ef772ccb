"""Scheme auto: which scheme each group of layers gets, so that a budget over all towers holds and accuracy suffers least.

Each group is quantized alone in each scheme and judged by what the tower then makes of a few samples; the losses are taken to add
up, and the choice is solved exactly (`ops.choice`). They do not quite add up: so the whole choice is measured too, beside every
uniform scheme that keeps the budget, and the better one is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.ops.choice import best_choice, random_choice
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize_budget import Budget, by_bits, by_size, require_possible
from mmcompress.passes.quantize_folds import add_folds
from mmcompress.passes.quantize_judge import Judge
from mmcompress.passes.quantize_layers import bytes_of
from mmcompress.passes.quantize_logits import of_layers
from mmcompress.passes.quantize_options import Group, Options, judged, options_of
from mmcompress.passes.quantize_schemes import AUTO, OFF
from mmcompress.passes.quantize_times import Timing
from mmcompress.progress import Progress
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize


@dataclass(frozen=True)
class Chosen:
    """Of each group, in order, the index of its candidate; and where it was measured, what each tower keeps with all in place."""

    places: list[int]
    cosines: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The sum over towers of 1 - cosine."""
        return sum(1 - cosine for cosine in self.cosines.values())


def plan_mixed(settings: Quantize, bundle: Bundle, towers: Sequence[Tower], context: Context, made: Plan) -> None:
    """Add to `made` the schemes of the layers of `towers`, the tensors they are made of, and the towers' reports.

    Raises UsageError where no choice keeps the budget, where all layers may stay float, and without data for one of the towers.
    """
    schemes = _schemes(settings)
    found = {tower.name: options_of(settings, bundle, tower, schemes, context) for tower in towers}
    groups = [group for options in found.values() for group in options.groups]
    timing = Timing(settings, bundle, towers, context) if settings.latency_ms is not None else None
    groups = timing.timed(groups) if timing else groups
    budget = timing.budget(groups) if timing else _budget(settings, bundle, towers, groups)
    require_possible(budget, groups, list(found))
    judges: dict[str, Judge] = {}
    if settings.assign == "measured":
        judges = {name: Judge(bundle, name, context, settings.sensitivity_samples) for name in found}
        groups = judged(groups, judges, context.progress)

    def choose(limit: Budget) -> list[int] | None:
        priced = limit.priced(groups)
        return best_choice(priced, limit.limit) if judges else random_choice(priced, limit.limit, context.seed)

    report: dict[str, Any] = {"budget": {budget.key: budget.given}, "assigned": settings.assign}
    if timing:
        places, budget, report["tried_ms"] = timing.within(groups, budget, choose)
    else:
        places = choose(budget) or []  # there is one: `require_possible`
    chosen = _measured(judges, groups, places)
    if judges:
        report["predicted_loss"] = round(sum(g.candidates[k].loss for g, k in zip(groups, places, strict=True)), 7)
        same = {scheme: [group.place_of(scheme) for group in groups] for scheme in schemes}
        rivals = {
            scheme: _measured(judges, groups, each)
            for scheme, each in same.items()
            if budget.spent(groups, each) <= budget.limit
            and (timing is None or each == places or timing.took(groups, each) <= budget.given)
        }
        chosen = _better(chosen, rivals, budget, report, context.progress)
        _warn(chosen, budget, settings.min_cosine, context.progress)
    report["spent"] = round(budget.shown(budget.spent(groups, chosen.places)), 4)
    made.decisions["mixed"] = report
    for tower in towers:
        reported = _recorded(tower, found[tower.name], groups, chosen.places, made)
        if judges:
            judge = judges[tower.name]
            reported["cosine"] = round(chosen.cosines[tower.name], 6)
            reported["judged_on"] = {"samples": judge.samples, "runs": judge.runs}
        reported |= found[tower.name].smoothed
        made.decisions["towers"][tower.name] = {"bytes_before": bytes_of(bundle, tower), **reported}
        if settings.fold:
            add_folds(bundle, tower, made)


def _schemes(settings: Quantize) -> tuple[str, ...]:
    """Return what layers may have besides floats. Rounded inputs only save time: in bytes W8A8 is W8A16, and loses more."""
    smallest = () if settings.target == "tensorrt" else ("W4A16",)
    return (*smallest, "W8A16", *(("W8A8",) if settings.latency_ms is not None else ()))


def _budget(settings: Quantize, bundle: Bundle, towers: Sequence[Tower], groups: Sequence[Group]) -> Budget:
    if settings.bits is not None:
        return by_bits(settings.bits, groups)
    assert settings.size_mib is not None, "one of them is given"
    return by_size(settings.size_mib, groups, sum(bytes_of(bundle, tower) for tower in towers))


def _measured(judges: Mapping[str, Judge], groups: Sequence[Group], places: list[int]) -> Chosen:
    modules: dict[str, dict[str, nn.Module]] = {group.tower: {} for group in groups}
    for group, place in zip(groups, places, strict=True):
        modules[group.tower] |= group.candidates[place].made
    return Chosen(places, {name: judge.cosine(modules[name]) for name, judge in judges.items()})


def _better(
    best: Chosen, uniform: Mapping[str, Chosen], budget: Budget, report: dict[str, Any], progress: Progress
) -> Chosen:
    """Return `best`, or a uniform scheme within the budget that measures as well or better; say which, and add to `report`."""
    report["measured_loss"] = round(best.loss, 7)
    report["uniform_loss"] = {scheme: round(chosen.loss, 7) for scheme, chosen in uniform.items()}
    rival = min(uniform, key=lambda scheme: uniform[scheme].loss, default=None)
    if rival is None or best.loss < uniform[rival].loss:
        report["kept"] = "auto"
        others = [f"{scheme} for all layers {chosen.loss:.2e}" for scheme, chosen in uniform.items()]
        progress.say(
            f"auto: 1 - cosine {best.loss:.2e} within {budget}; {', '.join(others) or 'no single scheme fits'}"
        )
        return best
    report["kept"] = f"uniform {rival}"
    progress.say(
        f"auto is no better than {rival} for all layers: 1 - cosine {best.loss:.2e} against {uniform[rival].loss:.2e} "
        f"within {budget}; {rival} is kept"
    )
    return uniform[rival]


def _warn(chosen: Chosen, budget: Budget, least: float, progress: Progress) -> None:
    for tower, cosine in chosen.cosines.items():
        if cosine < least:
            progress.say(f"{tower}: cosine {cosine:.4f}, below min_cosine {least:g}; it needs more than {budget}")


def _recorded(
    tower: Tower, options: Options, groups: Sequence[Group], places: Sequence[int], made: Plan
) -> dict[str, Any]:
    """Add the layers of one tower to `made`; return its report."""
    mine = [(group, k) for group, k in zip(groups, places, strict=True) if group.tower == tower.name]
    layers = {path: scheme for group, k in mine for path, scheme in group.candidates[k].layers.items()}
    sizes = {path: size for path, size in options.sizes.items() if layers.get(path) == "W4A16"}
    made.decisions["layers"] |= layers
    made.decisions["groups"] |= sizes
    made.decisions["logits"] |= of_layers(options.logits, layers)
    made.decisions["tied"] |= {linear: table for table, linear in tower.tied if linear in layers}
    for name, value in options.tensors.items():
        path, _, buffer = name.rpartition(".")
        if layers.get(path) == ("W4A16" if buffer.startswith("weight_") else "W8A8"):
            made.tensors[name] = value
    return {
        "scheme": AUTO,
        "schemes": dict(Counter(group.candidates[k].scheme for group, k in mine)),
        "kept_float": [group.name for group, k in mine if group.candidates[k].scheme == OFF],
        "options": [
            {
                "layers": group.name,
                "scheme": each.scheme,
                "bytes_saved": group.candidates[-1].bytes - each.bytes,
                "loss": round(each.loss, 7),
                "chosen": index == k,
            }
            for group, k in mine
            for index, each in enumerate(group.candidates)
        ],
    }
