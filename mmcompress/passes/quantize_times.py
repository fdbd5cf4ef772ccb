"""What the products of each group of layers take in each scheme, and the choice that keeps a budget of milliseconds.

A layer's product is timed alone, once for each shape and scheme. Alone it finds other caches than in a model, and layers of one
input round it each for themselves: so the model is exported and timed with the whole choice in place, and where it takes longer
than it may, the budget of the products shrinks by what it takes too long.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context
from mmcompress.passes.latency import linear_rows, stages_of
from mmcompress.passes.quantize_budget import Budget, by_latency
from mmcompress.passes.quantize_options import Candidate, Group
from mmcompress.progress import track
from mmcompress.surgery.quantized import drop_ties
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize

TIMING_SECONDS = 120.0
"""About, to time the products of a model of a hundred million parameters, and to export and time a few choices."""
TRIALS = 4
"""How many choices are exported and timed at most."""


class Timing:
    """Times the products of layers, and the whole of `towers` with a choice in place.

    Raises UsageError where the run cannot time anything.
    """

    def __init__(self, settings: Quantize, bundle: Bundle, towers: Sequence[Tower], context: Context) -> None:
        assert settings.latency_ms is not None, "there is a budget of milliseconds"
        self.given = settings.latency_ms
        self.stopwatch = context.require_stopwatch("quantize.latency_ms", settings.target, hint="use bits or size_mib")
        self.bundle, self.towers, self.progress = bundle, towers, context.progress
        self.stages = stages_of(bundle, towers)

    def timed(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with what the products of each candidate take; patches and looking rows up take the same in all."""
        rows = {path: count for tower in self.towers for path, count in linear_rows(self.bundle, tower).items()}

        def milliseconds(group: Group, each: Candidate) -> float:
            paths = [path for path in group.candidates[0].layers if path in rows]
            layers = {path: each.made.get(path, self.bundle.module(path)) for path in paths}
            return sum(self.stopwatch.layer(layer, rows[path]) for path, layer in layers.items())

        def priced(group: Group) -> Group:
            each = group.candidates
            return replace(group, candidates=tuple(replace(one, milliseconds=milliseconds(group, one)) for one in each))

        return [priced(group) for group in track(groups, self.progress, "timing products", len(groups))]

    def budget(self, groups: Sequence[Group]) -> Budget:
        """Return the budget of the products: all but them takes what it takes in the float model."""
        return by_latency(self.given, groups, self.took(groups, [len(group.candidates) - 1 for group in groups]))

    def took(self, groups: Sequence[Group], places: Sequence[int]) -> float:
        """Return the milliseconds of the whole with a choice in place."""
        trial = copy.deepcopy(self.bundle)
        for group, place in zip(groups, places, strict=True):
            for path, module in group.candidates[place].made.items():
                trial.replace(path, module)
        drop_ties(trial.model)
        return self.stopwatch.model(trial, self.stages)

    def within(
        self, groups: Sequence[Group], budget: Budget, choose: Callable[[Budget], list[int] | None]
    ) -> tuple[list[int], Budget, list[float]]:
        """Return a choice that keeps the budget by measurement, the products' budget that led to it, and what was timed.

        Raises UsageError where none does.
        """
        tried: list[float] = []
        what = " and ".join(self.stages)
        while len(tried) < TRIALS and (places := choose(budget)) is not None:
            took = self.took(groups, places)
            tried.append(round(took, 3))
            self.progress.say(f"{what} take {took:.2f} ms, {self.given:g} are allowed")
            if took <= self.given:
                return places, budget, tried
            budget = replace(budget, limit=budget.limit - (took - self.given))
        raise UsageError(
            f"quantize.latency_ms is {self.given:g}, but {what} took {', '.join(f'{took:.2f}' for took in tried)} ms with the "
            "schemes that were to keep it",
            hint=f"allow {min(tried) * 1.05:.2f}, or prune or merge tokens as well",
        )
