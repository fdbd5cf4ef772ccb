"""`prune` within a budget of milliseconds: how much has to go is found by exporting and timing what would be left.

MACs say how much less there is to compute, not how much sooner a machine is done with it: narrow products use kernels worse, odd
widths worse than larger even ones, and what is not cut takes its time as before. So shares of the MACs are tried, each chosen by
the same scores, cut, exported and timed; what is taken was timed to keep the budget, though another share might, too.
What only changes values is left out of the trials: the repair of what stays.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.latency import solved, stages_of
from mmcompress.passes.prune_budget import most_removable, pools
from mmcompress.passes.prune_ranking import ranked

if TYPE_CHECKING:
    from mmcompress.passes.prune import Prune


def plan_within_latency(settings: Prune, bundle: Bundle, context: Context) -> Plan:
    """Return the plan that removes least of what the pass may remove such that the towers take `latency_ms` together.

    Raises UsageError where even the most that can go does not suffice, or nothing can be timed.
    """
    assert settings.latency_ms is not None, "there is a budget of milliseconds"
    everything = replace(settings, latency_ms=None, budget="macs", ratio=0.0)
    towers = everything.chosen(bundle)
    totals, groups, bounds, _ = everything.survey(bundle, towers)
    (whole,) = pools(totals, "macs", ratio=0.5, target=None, ratios={})
    # In thousandths, rounded down: a share that is too small by the last digit of a float would be refused.
    most = math.floor(1000 * most_removable(whole, groups, bounds, "macs") / whole.total) / 1000
    scores = ranked(everything, bundle, groups, context)

    def at(share: float) -> Prune:
        return replace(everything, ratio=1 - share)

    def planned(made: Prune, given: Bundle, only_timed: bool) -> Plan:
        made = replace(made, compensate="none") if only_timed else made
        return made.planned(given, context, scores)

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
