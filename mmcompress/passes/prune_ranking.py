"""What `prune` asks which score: one number for every unit, and whether the numbers of layers compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes import prune_scores
from mmcompress.passes.base import Context
from mmcompress.passes.prune_dims import displacements
from mmcompress.passes.prune_direct import direct_effects
from mmcompress.passes.prune_effects import taylor
from mmcompress.passes.prune_relevance import relevance
from mmcompress.passes.prune_routing import routing
from mmcompress.passes.prune_surgeon import surgeon
from mmcompress.passes.prune_units import Group

if TYPE_CHECKING:
    from mmcompress.passes.prune import Prune


def turns(ranking: str) -> bool:
    """Whether heads are turned before channels of them go, the last first: with the score that looks at data."""
    return ranking == "taylor"


def ranked(settings: Prune, bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """Return what the units of each group matter (U,). Raises UsageError where that is not finite, or needs data."""
    own = [group.kind == "head-dims" and turns(settings.ranking) for group in groups]
    dims = [group for group, mine in zip(groups, own, strict=True) if mine]
    rest = [group for group, mine in zip(groups, own, strict=True) if not mine]
    scores: dict[Group, Tensor] = {}
    if dims:
        found = displacements(bundle, dims, context, settings.multiple, settings.judging_samples, settings.repairs)
        scores |= zip(dims, found, strict=True)
    if rest:
        scores |= zip(rest, _measured(settings, bundle, rest, context), strict=True)
    for group in groups:
        if not scores[group].isfinite().all():
            raise UsageError(
                f"the {settings.ranking} score of {group.kind} in {group.tower} block {group.block} is not finite",
                hint="the model overflows on this data: load it in float32, or leave bad samples out",
            )
    return [scores[group] for group in groups]


def _measured(settings: Prune, bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
    ranking = settings.ranking
    if ranking == "random":
        return prune_scores.uniform_random(groups, context.seed)
    if ranking == "magnitude":
        return prune_scores.magnitude(bundle, groups)
    if ranking == "activation":
        return prune_scores.activation(bundle, groups, context, settings.compensate != "none", settings.balance)
    if ranking == "block-influence":
        return prune_scores.block_influence(bundle, groups, context)
    if ranking == "obs":
        return surgeon(bundle, groups, context, settings.ridge)
    if ranking == "routing":
        return routing(bundle, groups, context)
    if ranking == "relevance":
        return relevance(bundle, groups, context)
    if ranking == "direct-effect":
        return direct_effects(bundle, groups, context)
    return taylor(bundle, groups, context, settings.objective, ranking)


def normalised(settings: Prune) -> str:
    """Return how scores of different layers are made to compare, as `prune_budget.worth` names it."""
    if settings.ranking == "random":
        return "cost"
    if settings.normalise != "auto":
        return settings.normalise
    suits = {"taylor": "none", "obs": "none", "routing": "none", "taylor-signed": "norm", "taylor-absolute": "norm"}
    return suits.get(settings.ranking, "layer")
