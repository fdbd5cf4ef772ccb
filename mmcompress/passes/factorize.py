"""factorize: Linears as products of two thinner ones, under one budget across towers.

A singular value is a unit that costs as many parameters as a row and a column, and loses its square; `ops.allocation` spends the
budget over all layers, as it does for `prune`. What the singular values are of is said by `method` (`ops.low_rank`), what they are
worth beside those of other layers by `weigh` (`factorize_fit`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan, Work, chosen_towers
from mmcompress.passes.factorize_checks import require_factorizable, require_sensible
from mmcompress.passes.factorize_fit import Fitted, fitted
from mmcompress.passes.factorize_ranks import Layer, choose_ranks, list_layers, require_possible
from mmcompress.passes.prune_budget import Pool, pools
from mmcompress.passes.prune_cut import set_parameters
from mmcompress.passes.prune_units import Costs, count_costs
from mmcompress.passes.stacked import say_left
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.low_rank import LowRankLinear
from mmcompress.views import Tower


@dataclass(frozen=True)
class Factorize:
    """Replace Linears by products of two thinner ones (low rank), under one budget across towers.

    Each layer of an attention or feed-forward gets a rank of its own, or stays as it is where two factors would not pay. The layers
    are plain Linears, which quantize and distill find; plain transformers does not load them.
    """

    name: ClassVar[str] = "factorize"

    ratio: float = 0.2
    """Share of the towers' parameters to remove, embeddings and projections counted in; 0 changes nothing."""
    target: float | None = None
    """Instead of `ratio` and `ratios`: the parameters all chosen towers may have together afterwards."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Separate ratios for towers, such as vision=0.2,text=0.1; the other towers share `ratio`."""
    method: Literal["svd-llm", "asvd", "svd"] = "svd-llm"
    """Which directions of a layer's outputs stay: those whose loss changes its outputs least on the calibration samples (SVD-LLM);
    those of the weights scaled by the inputs' mean sizes (ASVD); or those of the weights alone (SVD), which needs no data."""
    weigh: Literal["effect", "energy"] = "effect"
    """What a change of a layer's outputs is measured by: how far it moves what the tower gives out, to first order, in one currency
    for all layers; or its energy beside that of the layer's outputs. With svd always the energy of the weights."""
    alpha: float = 0.5
    """For asvd: the power of the inputs' mean sizes; 0 is plain SVD."""
    directions: Literal["leading", "random"] = "leading"
    """Leading directions stay, or as many random ones, fitted as well as they allow (the control)."""
    layers: tuple[str, ...] = ("attention", "mlp")
    """Which Linears of the blocks: attention, mlp. Never embeddings, projections and output layers."""
    towers: tuple[str, ...] = ()
    """Towers to factorize; empty means all."""
    min_keep: float = 0.1
    """Share of a layer's full rank (the smaller of its sides) that always stays; at least one multiple does."""
    multiple: int = 8
    """Ranks are multiples of this, which matrix kernels like."""

    def __post_init__(self) -> None:
        require_sensible(self)

    @property
    def looks_at_data(self) -> bool:
        """Whether calibration samples are needed."""
        return self.method != "svd"

    def control(self, decisions: Mapping[str, Any] | None = None) -> Factorize | None:
        """Return the pass that keeps as many random directions of each layer."""
        return None if self.directions == "random" else dataclasses.replace(self, directions="random")

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """A look at the samples, with gradients where effects are weighed."""
        looks = 0 if not self.looks_at_data else 3 if self.weigh == "effect" else 1
        return looks * work.samples * work.forward

    def check(self, bundle: Bundle) -> None:
        """Refuse towers, layers and ratios this cannot work on."""
        self.survey(bundle)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Fit every layer at its largest rank, choose ranks, and cut the factors to them."""
        return self.planned(bundle, context)

    def planned(self, bundle: Bundle, context: Context, found: Mapping[str, Fitted] | None = None) -> Plan:
        """Return the plan; `found` is what layers can become, where that is known."""
        totals, layers, wanted = self.survey(bundle)
        ranks: dict[str, int] = {}
        tensors: dict[str, Tensor] = {}
        if wanted:
            names = {name for pool in wanted for name in pool.towers}
            layers = [layer for layer in layers if layer.tower in names and layer.ranks]
            found = fitted(self, bundle, layers, context) if found is None else found
            for pool in wanted:
                ranks |= choose_ranks(pool, layers, {path: each.directions.losses for path, each in found.items()})
            for path, rank in ranks.items():
                linear = bundle.module(path)
                assert isinstance(linear, nn.Linear), f"{path} was not checked to be a Linear"
                tensors |= found[path].tensors(path, linear, rank)
        return Plan({"ranks": ranks, "before": {name: asdict(costs) for name, costs in totals.items()}}, tensors)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Put two Linears in the place of each, at the rank that was decided."""
        for path, rank in plan.decisions["ranks"].items():
            linear = bundle.module(path)
            assert isinstance(linear, nn.Linear), f"{path} was not checked to be a Linear"
            bundle.replace(path, LowRankLinear(linear, rank))
            del linear
            give_back_freed()
        set_parameters(bundle, plan.tensors)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing; recount what the model costs now."""
        towers = self.chosen(bundle)
        left = say_left(bundle, towers, context, "whole")
        return {"recount": {tower.name: asdict(count_costs(bundle, tower)) for tower in towers}, **left}

    def chosen(self, bundle: Bundle) -> list[Tower]:
        """Return the towers to factorize."""
        return chosen_towers(self.name, bundle, self.towers, self.ratios)

    def survey(self, bundle: Bundle) -> tuple[dict[str, Costs], list[Layer], list[Pool]]:
        """Return what the towers cost, their layers and the budgets. Raises UsageError when these cannot be met."""
        towers = self.chosen(bundle)
        require_factorizable(self, bundle, towers)
        totals = {tower.name: count_costs(bundle, tower) for tower in towers}
        layers = list_layers(bundle, towers, self.layers, self.min_keep, self.multiple)
        if not any(layer.ranks for layer in layers):
            raise UsageError(
                f"factorize matched nothing: no Linear of these blocks gets smaller in ranks of {self.multiple} and more",
                hint="use a smaller multiple or min_keep, or other layers",
            )
        wanted = pools({name: costs.parameters for name, costs in totals.items()}, self.ratio, self.target, self.ratios)
        for pool in wanted:
            require_possible(bundle.family.name, pool, layers)
        return totals, layers, wanted
