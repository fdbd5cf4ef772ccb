"""Scheme auto: which scheme each group of layers gets, so that a budget over all towers holds and accuracy suffers least.

Each group is quantized alone in each scheme and judged by what the tower then makes of a few samples; the losses are taken to add
up, and the choice is solved exactly (`ops.choice`). They do not quite add up: so the whole choice is measured too, beside every
uniform scheme that keeps the budget, and the better one is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.choice import Option, best_choice, cheapest, random_choice
from mmcompress.passes.base import Context, Plan, require_one
from mmcompress.passes.quantize_layers import bytes_of
from mmcompress.passes.quantize_options import Candidate, Group, Options, options_of
from mmcompress.passes.quantize_schemes import AUTO, OFF
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize

MIB = 2**20
Choice = list[int]
"""Of each group, in order, the index of its candidate."""


@dataclass(frozen=True)
class Budget:
    """What may be spent: `limit`, in what `cost` counts of a candidate."""

    key: str
    given: float
    limit: int | float
    cost: Callable[[Candidate], int | float]
    shown: Callable[[int | float], float]
    """From a sum of costs to what the parameter `key` means."""

    def of(self, groups: Sequence[Group], choice: Choice) -> float:
        """Return what a choice comes to, as the parameter has it."""
        return self.shown(sum(self.cost(group.candidates[k]) for group, k in zip(groups, choice, strict=True)))

    def holds(self, groups: Sequence[Group], choice: Choice) -> bool:
        """Whether a choice keeps the budget."""
        return sum(self.cost(group.candidates[k]) for group, k in zip(groups, choice, strict=True)) <= self.limit


@dataclass(frozen=True)
class Measured:
    """A choice, and what each tower keeps with all of it in place."""

    choice: Choice
    cosines: dict[str, float]

    @property
    def loss(self) -> float:
        """The sum over towers of 1 - cosine."""
        return sum(1 - cosine for cosine in self.cosines.values())


def require_budget(settings: Quantize, auto: bool) -> None:
    """Raise UsageError where scheme auto is used without one budget and samples to judge on, or its parameters without it."""
    budgets = {"bits": settings.bits, "size_mib": settings.size_mib}
    require_one("quantize", **budgets)
    given = {key: value for key, value in budgets.items() if value is not None}
    for key, value in given.items():
        if value <= 0:
            raise UsageError(
                f"quantize.{key} is {value:g}; expected a number > 0", hint="bits 5 and size_mib 20 are such"
            )
    if not auto and (given or settings.assign == "random"):
        raise UsageError(
            f"quantize.{next(iter(given), 'assign')} is for scheme auto, which nothing has",
            hint="give --scheme auto, or leave it out",
        )
    if auto and not given:
        raise UsageError("quantize.scheme auto needs a budget", hint="give --bits 5 (on average) or --size-mib 20")
    if auto and settings.assign == "measured" and settings.sensitivity_samples == 0:
        raise UsageError("quantize.sensitivity_samples is 0, and scheme auto is decided on samples", hint="16 is usual")


def plan_mixed(settings: Quantize, bundle: Bundle, towers: Sequence[Tower], context: Context, made: Plan) -> None:
    """Add to `made` the schemes of the layers of `towers`, the tensors they are made of, and the towers' reports.

    Raises UsageError where no choice keeps the budget, where all layers may stay float, and without data for one of the towers.
    """
    found = {tower.name: options_of(settings, bundle, tower, context) for tower in towers}
    groups = [group for options in found.values() for group in options.groups]
    budget = _budget(settings, bundle, towers, groups)
    priced = [[Option(each.loss, budget.cost(each)) for each in group.candidates] for group in groups]
    drawn = settings.assign == "random"
    choice = random_choice(priced, budget.limit, context.seed) if drawn else best_choice(priced, budget.limit)
    if choice is None:
        least = budget.of(groups, cheapest(priced))
        raise UsageError(
            f"quantize.{budget.key} is {budget.given:g}; with every layer as small as it can be "
            f"{' and '.join(found)} take {least:.3f}",
            hint=f"allow {budget.key} {least * 1.005:.2f} or more" + _smaller(settings),
        )
    if all(group.candidates[k].scheme == OFF for group, k in zip(groups, choice, strict=True)):
        raise UsageError(
            f"quantize.{budget.key} is {budget.given:g}, with which every layer of {' and '.join(found)} may stay float",
            hint=f"give less, or leave the pass out; now they take {budget.of(groups, choice):.3f}",
        )
    report: dict[str, Any] = {"budget": {budget.key: budget.given}, "assigned": settings.assign}
    cosines: dict[str, float] = {}
    if not drawn:
        kept = _better(found, groups, budget, choice, context, report, settings.min_cosine)
        choice, cosines = kept.choice, kept.cosines
    report["spent"] = round(budget.of(groups, choice), 4)
    made.decisions["mixed"] = report
    for tower in towers:
        made.decisions["towers"][tower.name] = _recorded(tower, bundle, found[tower.name], groups, choice, made)
        if tower.name in cosines:
            made.decisions["towers"][tower.name]["cosine"] = round(cosines[tower.name], 6)


def _budget(settings: Quantize, bundle: Bundle, towers: Sequence[Tower], groups: Sequence[Group]) -> Budget:
    if settings.bits is not None:
        weights = sum(group.weights for group in groups)
        limit = int(settings.bits * weights)
        return Budget("bits", settings.bits, limit, lambda each: each.bits, lambda spent: spent / weights)
    assert settings.size_mib is not None, "one of both is given"
    whole = sum(bytes_of(bundle, tower) for tower in towers)
    fixed = whole - sum(group.candidates[-1].bytes for group in groups)
    limit = int(settings.size_mib * MIB) - fixed
    return Budget("size_mib", settings.size_mib, limit, lambda each: each.bytes, lambda spent: (spent + fixed) / MIB)


def _smaller(settings: Quantize) -> str:
    return "" if settings.group_size >= 128 or settings.bits is not None else ", or larger groups with group_size"


def _better(
    found: dict[str, Options],
    groups: list[Group],
    budget: Budget,
    choice: Choice,
    context: Context,
    report: dict[str, Any],
    least: float,
) -> Measured:
    """Return `choice`, or a uniform scheme within the budget that measures as well or better; say which, and add to `report`."""
    mixed = _measure(found, groups, choice)
    uniform: dict[str, Measured] = {}
    for scheme in sorted({each.scheme for group in groups for each in group.candidates} - {OFF}):
        same = [group.place_of(scheme) for group in groups]
        if budget.holds(groups, same):
            uniform[scheme] = mixed if same == choice else _measure(found, groups, same)
    report["predicted_loss"] = round(sum(group.candidates[k].loss for group, k in zip(groups, choice, strict=True)), 7)
    report["measured_loss"] = round(mixed.loss, 7)
    report["uniform_loss"] = {scheme: round(measured.loss, 7) for scheme, measured in uniform.items()}
    rival = min(uniform, key=lambda scheme: uniform[scheme].loss, default=None)
    kept = mixed
    report["kept"] = "auto"
    where = f"{budget.key} {budget.given:g}"
    if rival is not None and uniform[rival].loss <= mixed.loss:
        kept = uniform[rival]
        report["kept"] = f"uniform {rival}"
        context.progress.say(
            f"auto is no better than {rival} for all layers: 1 - cosine {mixed.loss:.2e} against {kept.loss:.2e} within {where}; "
            f"{rival} is kept"
        )
    else:
        against = f", {rival} for all layers {uniform[rival].loss:.2e}" if rival else ", and no uniform scheme fits"
        context.progress.say(f"auto: 1 - cosine {mixed.loss:.2e} within {where}{against}")
    for tower, cosine in kept.cosines.items():
        if cosine < least:
            context.progress.say(f"{tower}: cosine {cosine:.4f}, below min_cosine {least:g}; allow more than {where}")
    return kept


def _measure(found: dict[str, Options], groups: Sequence[Group], choice: Choice) -> Measured:
    modules: dict[str, dict[str, nn.Module]] = {name: {} for name in found}
    for group, k in zip(groups, choice, strict=True):
        modules[group.tower] |= group.candidates[k].made
    cosines = {}
    for name, options in found.items():
        assert options.judge is not None, "schemes are drawn at random"
        cosines[name] = options.judge.cosine(modules[name])
    return Measured(choice, cosines)


def _recorded(
    tower: Tower, bundle: Bundle, options: Options, groups: Sequence[Group], choice: Choice, made: Plan
) -> dict[str, Any]:
    """Add the layers of one tower to `made`; return its report."""
    mine = [(group, k) for group, k in zip(groups, choice, strict=True) if group.tower == tower.name]
    layers = {path: scheme for group, k in mine for path, scheme in group.candidates[k].layers.items()}
    sizes = {path: size for path, size in options.sizes.items() if layers.get(path) == "W4A16"}
    made.decisions["layers"] |= layers
    made.decisions["groups"] |= sizes
    made.decisions["tied"] |= {linear: table for table, linear in tower.tied if linear in layers}
    made.tensors.update({name: value for name, value in options.tensors.items() if name.rpartition(".")[0] in sizes})
    judge = options.judge
    return {
        "scheme": AUTO,
        "bytes_before": bytes_of(bundle, tower),
        "schemes": dict(Counter(group.candidates[k].scheme for group, k in mine)),
        "kept_float": [group.name for group, k in mine if group.candidates[k].scheme == OFF],
        "judged_on": {"samples": judge.samples, "runs": judge.runs} if judge else {},
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
