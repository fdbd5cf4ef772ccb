"""prune: remove attention heads or channels of heads, MLP neurons, experts or whole blocks, under one budget across towers.

Units are scored, priced exactly and chosen by `ops.allocation`; their rows and columns are then cut out of the Linears, so the
model is smaller, not masked. What stays can be repaired in closed form from calibration statistics (`ops.reconstruction`). Scores
and statistics all come from the uncut model, in one shot; several prune steps with smaller ratios measure afresh in between.

How scores of different layers compare (`normalise`): with "layer", scores are divided by their layer's mean and a unit is worth
that times its cost, so every layer gives up its relatively least useful units and layers differ by how uneven their scores are.
With "kind" they are standardised over all units of one kind, of all towers, and sorted (UPop). With "none" scores are taken as the
damage of removing a unit, in one currency for all layers and both towers, and the least damage per parameter or MAC goes first;
Taylor and optimal brain surgeon mean just that. "auto" is "none" for these two, "layer" otherwise, but for signed and absolute
first-order effects, which are divided by the root mean square of the layer.

Channels of heads go from all heads of an attention alike, which are turned first so that the last ones matter least
(`prune_dims`). Experts are scored by how much of the tokens' routing weight they are given (`prune_routing`); "auto" takes that as
it is. What is left is not repaired: a token that had chosen one that is gone goes through the next best, with weights that sum to
1 again.

How many units each layer gives up (`allocate`) follows from that with "knapsack". "even" asks scores only which units of a layer
go, and "evolutionary" tries on the model how many of each (`prune_evolution`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan, Work, chosen_towers
from mmcompress.passes.latency import SECONDS
from mmcompress.passes.prune_budget import (
    Allocator,
    Bounds,
    choose,
    even,
    knapsack,
    pools,
    require_possible,
    times,
    worth,
)
from mmcompress.passes.prune_checks import require_prunable, require_sensible
from mmcompress.passes.prune_crosscheck import crosscheck
from mmcompress.passes.prune_cut import cut_blocks, cut_dims, cut_experts, cut_heads, cut_neurons, set_parameters
from mmcompress.passes.prune_dims import SHARES, narrowed_heads
from mmcompress.passes.prune_evolution import Evolution
from mmcompress.passes.prune_latency import plan_within_latency
from mmcompress.passes.prune_ranking import normalised, ranked, turns
from mmcompress.passes.prune_repair import repaired_readers
from mmcompress.passes.prune_split import decisions, split
from mmcompress.passes.prune_units import Group, count_costs, count_tokens, list_groups, read_ranges
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.views import Tower


@dataclass(frozen=True)
class Prune:
    """Remove attention heads or their channels, MLP neurons, experts or whole blocks, under one budget across towers.

    Cuts rows and columns out of the Linears, and experts with their rows of the router. Widths may differ from block to block; with
    `uniform` and without heads, plain transformers loads the result.
    """

    name: ClassVar[str] = "prune"

    ratio: float = 0.3
    """Share of the towers' parameters or MACs to remove, embeddings and projections counted in; 0 changes nothing."""
    target: float | None = None
    """Instead of `ratio` and `ratios`: the parameters or MACs all chosen towers may have together afterwards."""
    latency_ms: float | None = None
    """Instead of `ratio`: milliseconds that the exported towers may take together on this machine; a model that writes: to read its
    prompt. What units take is timed layer by layer; shares of that time are tried, exported and timed."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Separate ratios for towers, such as vision=0.5,text=0.1; the other towers share `ratio`."""
    budget: Literal["parameters", "macs"] = "parameters"
    """What is counted: parameters, or multiply-accumulates at the family's example input size."""
    units: tuple[str, ...] = ("heads", "neurons")
    """What may go: heads or head-dims (every head becomes narrower, where places do not turn its channels in pairs), neurons, or
    blocks alone, or experts alone. Without experts a token goes through as many as before: the
    model is smaller, not faster."""
    score: Literal[
        "auto",
        "taylor",
        "taylor-signed",
        "taylor-absolute",
        "obs",
        "activation",
        "relevance",
        "direct-effect",
        "magnitude",
        "routing",
        "block-influence",
        "random",
    ] = "auto"
    """What makes a unit important; auto: routing for experts, obs where what stays is refitted, taylor else and for head-dims.
    First-order effects on `objective`: taylor is their mean square (Fisher, optimal brain damage), taylor-signed their mean,
    taylor-absolute the mean of their sizes (Michel); taylor of head-dims: what the embeddings move, tried width by width; obs:
    what refitting the rest cannot make up for (optimal brain surgeon); activation: Wanda; relevance: attention and its gradient
    (Chefer), of heads alone; direct-effect: what a unit of a language model itself says of right answers (multimodal neurons);
    routing: the mean weight that a router gives it over tokens, of
    experts alone; block-influence: of blocks alone; random is the control. Only magnitude and random need no data."""
    objective: Literal["embedding", "contrastive", "answers"] = "embedding"
    """What Taylor scores differentiate: each embedding by itself (no pairs needed), the contrastive loss of batches of pairs, or
    the likelihood of right answers."""
    balance: bool = False
    """Activation scores of a language model that is shown pictures: image tokens and text tokens count as much together."""
    normalise: Literal["auto", "layer", "kind", "none"] = "auto"
    """How scores of layers compare: relative to their layer, standardised over all heads and all neurons, as they are, or (auto)
    whichever suits the score."""
    allocate: Literal["knapsack", "even", "evolutionary"] = "knapsack"
    """How the budget is shared out: least loss of score per cost; the same share from every group of units; or an evolutionary
    search over how many units each gives up, judged on samples by the model with those units silenced (needs data)."""
    evaluations: int = 100
    """Evolutionary allocation only: how many allocations are tried."""
    judging_samples: int = 32
    """How many samples at most each allocation of an evolutionary search is tried on, and each width of head-dims."""
    compensate: Literal["least-squares", "bias", "none"] = "least-squares"
    """Repair what stays: refit the reading Linears to their outputs in the uncut model, fold the removed mean into their biases,
    or neither. Needs data. Blocks and experts are removed without repair."""
    ridge: float = 0.01
    """Least squares and obs only: how strongly refitted weights are held to the original, relative to the channels' variance."""
    uniform: bool = False
    """The same width in every block of a tower, so that config.json can say it."""
    towers: tuple[str, ...] = ()
    """Towers to prune; empty means all."""
    min_keep: float = 0.1
    """Share of a block's heads, neurons and experts (of a tower's blocks) that always stays; at least one does, and as many experts
    as a token goes through."""
    multiple: int = 8
    """Counts of neurons and of a head's channels are rounded to multiples of this, which matrix kernels like. 64 suits int8 kernels
    (AMX, VNNI)."""
    protect: tuple[int, ...] = ()
    """Blocks never touched, by index in each tower that has so many; negative ones count from the end."""
    crosscheck: bool = False
    """Compare what belongs to a unit with torch-pruning's dependency graph first (needs torch-pruning)."""

    def __post_init__(self) -> None:
        require_sensible(self)

    @property
    def ranking(self) -> str:
        """The score that is meant."""
        if self.score != "auto":
            return self.score
        if "experts" in self.units:
            return "routing"
        if "head-dims" in self.units:
            return "taylor"
        refits = self.compensate == "least-squares" and self.repairs and self.objective == "embedding"
        return "obs" if refits else "taylor"

    @property
    def repairs(self) -> bool:
        """Whether what stays is repaired."""
        return self.compensate != "none" and not {"blocks", "experts"} & set(self.units)

    def control(self, decisions: Mapping[str, Any] | None = None) -> Prune | None:
        """Return the pass that removes as much at random, repaired the same way."""
        if self.score == "random":
            return None
        random = dataclasses.replace(self, score="random", balance=False, allocate="knapsack", objective="embedding")
        if self.latency_ms is not None and decisions is not None:
            left = sum(costs["macs"] for costs in decisions["after"].values())
            return dataclasses.replace(random, latency_ms=None, budget="macs", target=float(left))
        return random

    def streams(self, data: bool = False) -> bool:
        """Whether scores come from one block's weights at a time, and nothing is repaired."""
        alone = self.ranking in ("magnitude", "random") and self.allocate != "evolutionary"
        changed = self.repairs or "head-dims" in self.units
        return alone and not changed and not self.crosscheck and not data

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """One look at the samples for the scores, with gradients for most, two for the repair, one for each allocation tried.

        Head channels take four more for each: their directions, and their widths are tried.
        """
        once = ("activation", "direct-effect", "routing", "block-influence")
        scores = {"magnitude": 0, "random": 0, **dict.fromkeys(once, 1)}.get(self.ranking, 3)
        repair, tried = 2 if self.repairs else 0, 0
        if "head-dims" in self.units and turns(self.ranking):
            scores, repair = scores + 4, repair + 4
            attentions = sum(1 + bool(block.cross) for tower in self.chosen(bundle) for block in tower.blocks)
            tried = len(SHARES) * attentions * min(self.judging_samples, work.samples)
        timed = SECONDS if self.latency_ms is not None else 0.0
        if self.allocate == "evolutionary":
            tried = (self.evaluations + repair) * min(self.judging_samples, work.samples)
        return ((scores + repair) * work.samples + tried) * work.forward + timed

    def check(self, bundle: Bundle) -> None:
        """Refuse towers, modules and ratios this cannot work on."""
        towers = self.chosen(bundle)
        require_prunable(self, bundle, towers)
        self.survey(bundle, towers)
        if self.crosscheck:
            crosscheck(bundle, towers)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Score, price and choose; with `compensate`, also compute the new readers."""
        if self.latency_ms is not None:
            return plan_within_latency(self, bundle, context)
        return self.planned(bundle, context)

    def planned(
        self,
        bundle: Bundle,
        context: Context,
        scores: Sequence[Tensor] | None = None,
        timed: Sequence[Group] | None = None,
    ) -> Plan:
        """Return the plan for a share that is given; `scores` are those of all groups, where they are known.

        `timed`: the groups with what their units take, of which then `ratio` is a share.
        """
        totals, groups, bounds, wanted = self.survey(bundle, self.chosen(bundle))
        measure = "nanoseconds" if timed else self.budget
        if timed:
            groups, wanted = timed, pools(times(timed), self.ratio, None, {})
        chosen: dict[Group, list[int]] = {}
        search = Evolution(bundle, context, self.evaluations, self.judging_samples, self.repairs)
        allocators: dict[str, Allocator] = {"knapsack": knapsack, "even": even, "evolutionary": search}
        if wanted:
            names = {name for pool in wanted for name in pool.towers}
            groups = [group for group in groups if group.tower in names]
            found = ranked(self, bundle, groups, context) if scores is None else scores
            values = worth(groups, found, normalised(self), measure)
            for pool in wanted:
                chosen |= choose(bundle.family.name, pool, groups, values, bounds, measure, allocators[self.allocate])
        if turns(self.ranking):  # directions go from the last on, also among equals
            chosen |= {group: list(range(len(kept))) for group, kept in chosen.items() if group.kind == "head-dims"}
        cut = {group: kept for group, kept in chosen.items() if len(kept) < group.units}
        tensors: dict[str, Tensor] = {}
        if cut and self.repairs:
            whole = {group: kept for group, kept in cut.items() if group.kind != "head-dims"}
            tensors = repaired_readers(bundle, whole, context, self.compensate, self.ridge)
        narrow = {group: kept for group, kept in cut.items() if group.kind == "head-dims"}
        if narrow:
            method = self.compensate if self.repairs else "none"
            tensors |= narrowed_heads(bundle, narrow, context, turns(self.ranking), method, self.ridge)
        facts = {
            "score": self.ranking,
            "split": split(groups, cut),
            **({"search": search.facts} if search.facts else {}),
        }
        return Plan(decisions(totals, cut, bounds.depths), tensors, facts)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Cut what was decided, in place."""
        kept = plan.decisions["kept"]
        for tower in bundle.towers():
            for block in tower.blocks:
                key = f"{tower.name}.{block.index}"
                for place, attention in ((key, block.attention), (f"{key}.cross", block.cross)):
                    if attention and place in kept["heads"]:
                        cut_heads(bundle, attention, read_ranges(kept["heads"][place]))
                    if attention and place in kept.get("head-dims", ()):
                        cut_dims(bundle, attention, read_ranges(kept["head-dims"][place]))
                if block.mlp and key in kept["neurons"]:
                    cut_neurons(bundle, block.mlp, read_ranges(kept["neurons"][key]))
                if block.experts and key in kept.get("experts", ()):
                    cut_experts(bundle, block.experts, read_ranges(kept["experts"][key]))
                give_back_freed()
            if tower.name in kept["blocks"]:
                cut_blocks(bundle, tower, read_ranges(kept["blocks"][tower.name]))
        set_parameters(bundle, plan.tensors)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing; recount what the cut model costs."""
        return {"recount": {tower.name: asdict(count_costs(bundle, tower)) for tower in self.chosen(bundle)}}

    def chosen(self, bundle: Bundle) -> list[Tower]:
        """Return the towers to prune."""
        return chosen_towers(self.name, bundle, self.towers, self.ratios)

    def survey(self, bundle: Bundle, towers: Sequence[Tower], units: Sequence[str] = ()) -> tuple[Any, ...]:
        """Return what the towers cost, their groups (of `units`, else its own), bounds and pools.

        Raises UsageError when the budget cannot be met.
        """
        totals = {tower.name: count_costs(bundle, tower) for tower in towers}
        tokens = {path: count for tower in towers for path, count in count_tokens(bundle, tower).items()}
        depth = max(len(tower.blocks) for tower in towers)
        for index in self.protect:
            if not -depth <= index < depth:
                raise UsageError(
                    f"prune.protect names block {index}, and no tower has more than {depth} blocks",
                    hint=f"use 0 to {depth - 1}, or -1 for the last",
                )
        groups = list_groups(bundle, towers, units or self.units, self.protect, tokens)
        if not groups:
            raise UsageError("prune matched nothing: every block is protected", hint="protect fewer blocks")
        bounds = Bounds(self.min_keep, self.multiple, self.uniform, {tower.name: len(tower.blocks) for tower in towers})
        ratio = 0.0 if self.latency_ms is not None else self.ratio  # what has to go is found out later
        wanted = pools({name: costs.of(self.budget) for name, costs in totals.items()}, ratio, self.target, self.ratios)
        for pool in wanted:
            require_possible(bundle.family.name, pool, groups, bounds, self.budget)
        return totals, groups, bounds, wanted
