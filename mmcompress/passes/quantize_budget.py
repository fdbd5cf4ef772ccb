"""The budget of scheme auto: what it counts of each candidate, and errors where it is missing or cannot be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmcompress.errors import UsageError
from mmcompress.ops.choice import Option
from mmcompress.passes.base import require_one
from mmcompress.passes.quantize_options import Candidate, Group

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize

MIB = 2**20
TIMED = ("cpu", "openvino")
"""Targets whose engine runs a single layer."""
USUAL = {"bits": "5", "size_mib": "20", "latency_ms": "8"}


@dataclass(frozen=True)
class Budget:
    """What may be spent: `limit`, in what `cost` counts of a candidate."""

    key: str
    given: float
    limit: int | float
    cost: Callable[[Candidate], int | float]
    shown: Callable[[int | float], float]
    """From a sum of costs to what the parameter `key` means."""

    def spent(self, groups: Sequence[Group], choice: Sequence[int]) -> int | float:
        """Return what a choice costs."""
        return sum(self.cost(group.candidates[k]) for group, k in zip(groups, choice, strict=True))

    def priced(self, groups: Sequence[Group]) -> list[list[Option]]:
        """Return the groups as the solver sees them."""
        return [[Option(each.loss, self.cost(each)) for each in group.candidates] for group in groups]

    def __str__(self) -> str:
        return f"{self.key} {self.given:g}"


def by_bits(bits: float, groups: Sequence[Group]) -> Budget:
    """Return the budget of so many bits a weight on average."""
    weights = sum(group.weights for group in groups)
    return Budget("bits", bits, int(bits * weights), lambda each: each.bits, lambda spent: spent / weights)


def by_size(mebibytes: float, groups: Sequence[Group], total: int) -> Budget:
    """Return the budget of so many MiB for towers that take `total` bytes as they are, with all they consist of."""
    fixed = total - sum(group.candidates[-1].bytes for group in groups)
    limit = int(mebibytes * MIB) - fixed
    return Budget("size_mib", mebibytes, limit, lambda each: each.bytes, lambda spent: (spent + fixed) / MIB)


def by_latency(milliseconds: float, groups: Sequence[Group], now: float) -> Budget:
    """Return the budget of so many milliseconds for towers that take `now`: all but their products stays as it is."""
    fixed = now - sum(group.candidates[-1].milliseconds for group in groups)
    return Budget(
        "latency_ms", milliseconds, milliseconds - fixed, lambda each: each.milliseconds, lambda spent: spent + fixed
    )


def require_budget(settings: Quantize, auto: bool) -> None:
    """Raise UsageError where scheme auto is used without one budget and samples to judge on, or its parameters without it."""
    budgets: dict[str, Any] = {key: getattr(settings, key) for key in USUAL}
    require_one("quantize", **budgets)
    given = {key: value for key, value in budgets.items() if value is not None}
    for key, value in given.items():
        if value <= 0:
            raise UsageError(f"quantize.{key} is {value:g}; expected a number > 0", hint=f"{key} {USUAL[key]} is one")
    if not auto and (given or settings.assign == "random"):
        raise UsageError(
            f"quantize.{next(iter(given), 'assign')} is for scheme auto, which no tower has",
            hint="give --scheme auto, or leave it out",
        )
    if settings.latency_ms is not None and settings.target not in TIMED:
        raise UsageError(
            f"quantize.latency_ms is for targets {' and '.join(TIMED)}; {settings.target} cannot be timed layer by layer here",
            hint="give bits or size_mib",
        )
    if auto and not given:
        known = " or ".join(f"--{key.replace('_', '-')} {value}" for key, value in USUAL.items())
        raise UsageError("quantize.scheme auto needs a budget", hint=f"give {known}")
    if auto and settings.scaling != "none":
        raise UsageError(
            f"quantize.scaling is '{settings.scaling}', and scheme auto makes every layer in several schemes, unscaled",
            hint="leave scaling out, or give a scheme by name",
        )
    if auto and settings.correct_bias:
        raise UsageError(
            "quantize.correct_bias is for layers whose scheme is known, and scheme auto makes each in several",
            hint="leave it out, or give a scheme by name",
        )
    if auto and settings.activations != "static":
        raise UsageError(
            "quantize.activations is 'dynamic', and scheme auto knows grids of calibration samples alone",
            hint="leave activations out, or give a scheme by name",
        )
    if auto and settings.assign == "measured" and settings.sensitivity_samples == 0:
        raise UsageError(
            "quantize.sensitivity_samples is 0, and scheme auto decides by them", hint="give 16, or a scheme by name"
        )


def require_possible(budget: Budget, groups: Sequence[Group], towers: Sequence[str]) -> None:
    """Raise UsageError where even the smallest choice spends more than the budget, or where all may stay float."""
    least = [min(range(len(group.candidates)), key=lambda k: budget.cost(group.candidates[k])) for group in groups]
    most = [len(group.candidates) - 1 for group in groups]
    names = " and ".join(towers)
    if budget.spent(groups, least) > budget.limit:
        reached = budget.shown(budget.spent(groups, least))
        why = "tables and layers that no group divides take 8 bits"
        if budget.key == "latency_ms":
            why = "all else takes its time too, and on a busy machine longer"
        raise UsageError(
            f"quantize.{budget.key} is {budget.given:g}; the least that {names} can have is {reached:.3f}",
            hint=f"give {budget.key} {reached * 1.005 + 0.005:.2f} or more; {why}",
        )
    if budget.spent(groups, most) <= budget.limit:
        raise UsageError(
            f"quantize.{budget.key} is {budget.given:g}, with which every layer of {names} may stay float",
            hint=f"give less than the {budget.shown(budget.spent(groups, most)):.3f} they have now, or leave quantize out",
        )
