"""`prune` within a budget of milliseconds: how much has to go is found by exporting and timing what would be left.

What a unit takes is measured (`prune_times`): what goes is what loses least for the time it saves. How much of that time has to go
no sum of single layers says, since a model has other caches, and what is not cut takes its time as before. So shares of it are
tried, each chosen by the same scores and times, cut, exported and timed; what is taken was timed to keep the budget, though another
share might, too. What only changes values is left out of the trials: the repair of what stays.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.latency import solved, stages_of
from mmcompress.passes.prune_budget import most_removable, pools, times
from mmcompress.passes.prune_ranking import ranked
from mmcompress.passes.prune_times import timed

if TYPE_CHECKING:
    from mmcompress.passes.prune import Prune


def plan_within_latency(settings: Prune, bundle: Bundle, context: Context) -> Plan:
    """Return the plan that removes least of what the pass may remove such that the towers take `latency_ms` together.

    Raises UsageError where even the most that can go does not suffice, or nothing can be timed.
    """
    assert settings.latency_ms is not None, "there is a budget of milliseconds"
    everything = replace(settings, budget="macs", ratio=0.0)
    towers = everything.chosen(bundle)
    _, groups, bounds, _ = everything.survey(bundle, towers)
    stopwatch = context.require_stopwatch(f"{settings.name}.latency_ms", target="", hint="use ratio")
    priced = timed(bundle, towers, groups, stopwatch, context.progress)
    (whole,) = pools(times(priced), ratio=0.5, target=None, ratios={})
    # In thousandths, rounded down: a share that is too small by the last digit of a float would be refused.
    most = math.floor(1000 * most_removable(whole, priced, bounds, "nanoseconds") / whole.total) / 1000
    scores = ranked(everything, bundle, groups, context)

    def at(share: float) -> Prune:
        return replace(everything, ratio=1 - share)

    def planned(made: Prune, given: Bundle, only_timed: bool) -> Plan:
        made = replace(made, compensate="none") if only_timed else made
        return made.planned(given, context, scores, priced)

    return solved(
        settings.name,
        settings.latency_ms,
        stages_of(bundle, towers),
        at,
        1 - most,
        bundle,
        context,
        instead="ratio",
        grows=False,
        planned=planned,
    )
