"""Which parameters of `prune` go together, and which models it can work on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from mmcompress.bundle import Bundle, DualEncoder, TeacherForced
from mmcompress.errors import UsageError, closest
from mmcompress.passes.base import require_milliseconds, require_one
from mmcompress.passes.prune_direct import require_direct
from mmcompress.passes.prune_effects import SUMMARIES
from mmcompress.passes.prune_relevance import require_maps
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.low_rank import LowRankLinear
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.prune import Prune

KINDS = ("heads", "head-dims", "neurons", "experts", "blocks")
SCORES = (*SUMMARIES, "obs", "activation", "relevance", "direct-effect", "magnitude", "random")
SCORES_OF: dict[str, tuple[str, ...]] = {
    "blocks": ("block-influence", *SUMMARIES, "random"),
    "experts": ("routing", "magnitude", "random"),
    "head-dims": ("taylor", "magnitude", "random"),
}
"""Of units that are removed alone, and those beside which others have no more; the others have SCORES."""

NO_CHANNELS = {
    "experts": ("experts have no channels of their own", "that knows no experts"),
    "head-dims": ("narrower heads are turned before they are cut", "head-dims are directions across them"),
}
"""Units -> why they cannot be silenced, and why torch-pruning says nothing of them."""


def require_sensible(settings: Prune) -> None:
    """Raise UsageError for a value that is out of range, or asks for what another one rules out."""
    for key, value in {"ratio": settings.ratio, **{f"ratios.{k}": v for k, v in settings.ratios.items()}}.items():
        if not 0 <= value < 1:
            raise UsageError(f"prune.{key} is {value}; expected 0 <= ratio < 1", hint="it is the share removed")
    if settings.target is not None and not 1 <= settings.target < math.inf:
        raise UsageError(f"prune.target is {settings.target}; expected at least 1", hint=f"it counts {settings.budget}")
    require_one("prune", target=settings.target, ratios=settings.ratios or None, latency_ms=settings.latency_ms)
    require_milliseconds("prune.latency_ms", settings.latency_ms)
    if not 0 <= settings.min_keep <= 1:
        raise UsageError(f"prune.min_keep is {settings.min_keep}; expected 0..1", hint="it is the share that stays")
    if settings.multiple < 1:
        raise UsageError(f"prune.multiple is {settings.multiple}; expected at least 1", hint="8 suits most kernels")
    if not 0 <= settings.ridge < math.inf:
        raise UsageError(f"prune.ridge is {settings.ridge}; expected 0 or more", hint="0.01 is the default")
    unknown = [unit for unit in settings.units if unit not in KINDS]
    if unknown or not settings.units:
        raise UsageError(f"prune.units is {list(settings.units)}", hint=closest(unknown[0] if unknown else "", KINDS))
    if "blocks" in settings.units and len(set(settings.units)) > 1:
        raise UsageError("prune.units mixes blocks with parts of blocks", hint="use two prune steps, blocks first")
    if "experts" in settings.units and len(set(settings.units)) > 1:
        raise UsageError(
            "prune.units mixes experts with others, and no score compares them", hint="use two prune steps"
        )
    if {"heads", "head-dims"} <= set(settings.units):
        raise UsageError(
            "prune.units has heads and head-dims, and what one costs depends on how many of the other are left",
            hint="use two prune steps, heads first",
        )
    fitting = next((SCORES_OF[unit] for unit in settings.units if unit in SCORES_OF), SCORES)
    if settings.ranking not in fitting:
        raise UsageError(
            f"prune.score {settings.ranking} does not rank {' and '.join(settings.units)}",
            hint="use " + ", ".join(fitting),
        )
    if settings.uniform and settings.protect:
        raise UsageError("prune.uniform and prune.protect contradict each other", hint="drop one of them")
    _require_sensible_score(settings)
    _require_sensible_allocation(settings)


def _require_sensible_score(settings: Prune) -> None:
    if settings.ranking == "relevance" and set(settings.units) != {"heads"}:
        raise UsageError(
            "prune.score relevance ranks heads, by their attention maps, and prune.units has others",
            hint="use units=heads, and another prune step for neurons",
        )
    if settings.ranking == "taylor-signed" and settings.objective == "embedding":
        raise UsageError(
            "prune.score taylor-signed averages effects with their sign, and objective=embedding draws its sign at random",
            hint="use objective=contrastive (dual encoders), objective=answers (what answers in words), or score=taylor",
        )
    if "head-dims" in settings.units and settings.ranking == "taylor" and settings.objective != "embedding":
        raise UsageError(
            f"prune.objective is {settings.objective}, and head-dims are judged by what the embeddings move",
            hint="use objective=embedding, or units=heads",
        )
    if settings.balance and settings.ranking != "activation":
        raise UsageError(
            f"prune.balance weighs tokens for score activation, and the score is {settings.ranking}",
            hint="use score=activation, or leave balance out",
        )


def _require_sensible_allocation(settings: Prune) -> None:
    for key, value in (("evaluations", settings.evaluations), ("judging_samples", settings.judging_samples)):
        if value < 2:
            raise UsageError(
                f"prune.{key} is {value}; expected at least 2", hint="more find better allocations, slower"
            )
    _require_fit(settings)
    if settings.allocate != "knapsack" and "blocks" in settings.units:
        raise UsageError(
            f"prune.allocate {settings.allocate} shares units out among blocks, and whole blocks are to go",
            hint="use allocate=knapsack",
        )
    if settings.allocate == "evolutionary" and settings.latency_ms is not None:
        raise UsageError(
            "prune.allocate evolutionary would search anew for every share that prune.latency_ms tries",
            hint="use allocate=knapsack or even, or a budget of MACs",
        )


def _require_fit(settings: Prune) -> None:
    """Refuse what units that are no channels of the model as it is rule out."""
    if "experts" in settings.units and settings.latency_ms is not None:
        raise UsageError(
            "prune.latency_ms asks for less time, and without experts a token still goes through as many",
            hint="use ratio or target, or units=heads and neurons",
        )
    for unit, (silenced, traced) in NO_CHANNELS.items():
        if unit in settings.units and settings.allocate == "evolutionary":
            raise UsageError(
                f"prune.allocate evolutionary tries models with channels silenced, and {silenced}",
                hint="use allocate=knapsack or even",
            )
        if unit in settings.units and settings.crosscheck:
            raise UsageError(
                f"prune.crosscheck compares channels with torch-pruning's, and {traced}",
                hint="leave crosscheck out, or use other units",
            )


def require_prunable(settings: Prune, bundle: Bundle, towers: Sequence[Tower]) -> None:
    """Raise UsageError where layers of `towers` cannot be cut, or the score does not suit the model."""
    _require_objective(settings, bundle, towers)
    if settings.balance and not any(tower.prompt for tower in towers):
        raise UsageError(
            "prune.balance weighs image tokens against text, and no tower to be pruned is given both",
            hint="leave balance out, or name a language model that is shown pictures with --towers",
        )
    _require_feeding(settings, towers)
    for tower in towers:
        _require_plain(settings, bundle, tower)
    if settings.ranking == "relevance":
        require_maps(bundle, towers)
    if settings.ranking == "direct-effect":
        require_direct(bundle, towers)
    if "blocks" in settings.units and any(record.name == "merge-tokens" for record in bundle.history):
        raise UsageError(
            "tokens are already merged, with a schedule per block; removing blocks would break it",
            hint="put prune before merge-tokens",
        )
    for tower in towers:
        whole = [part.why_whole for block in tower.blocks for part in (block.attention, block.cross) if part]
        if set(settings.units) == {"heads"} and all(whole):
            raise UsageError(
                f"heads of the {tower.name} tower cannot be removed: {whole[0]}",
                hint="prune its neurons or blocks, or name other towers with --towers",
            )
        rigid = [part.why_rigid for block in tower.blocks for part in (block.attention, block.cross) if part]
        if set(settings.units) == {"head-dims"} and all(rigid):
            raise UsageError(
                f"heads of the {tower.name} tower cannot become narrower: {rigid[0]}",
                hint="prune its heads, neurons or blocks, or name other towers with --towers",
            )
        if "blocks" in settings.units and tower.why_fixed_depth:
            raise UsageError(
                f"blocks of the {tower.name} tower cannot be removed: {tower.why_fixed_depth}",
                hint="prune its heads and neurons, or name other towers with --towers",
            )


def _require_objective(settings: Prune, bundle: Bundle, towers: Sequence[Tower]) -> None:
    if settings.ranking not in SUMMARIES:
        return
    if settings.objective == "contrastive" and not isinstance(bundle.family, DualEncoder):
        raise UsageError(
            f"prune.objective is contrastive, and {bundle.family.name} models embed nothing into a shared space",
            hint="use objective=answers" if settings.ranking == "taylor-signed" else "use objective=embedding",
        )
    if settings.objective == "answers":
        answering = bundle.family.answering if isinstance(bundle.family, TeacherForced) else ""
        for tower in towers:
            if tower.name != answering:
                raise UsageError(
                    f"prune.objective is answers, and the {tower.name} tower of {bundle.family.name} models gives none",
                    hint=f"use --towers {answering}, or objective=embedding"
                    if answering
                    else "use objective=embedding",
                )


def _require_feeding(settings: Prune, towers: Sequence[Tower]) -> None:
    """Raise UsageError where no block of the towers has what alone may go: experts, or neurons."""
    blocks = [block for tower in towers for block in tower.blocks]
    if "experts" in settings.units and not any(block.experts for block in blocks):
        raise UsageError(
            "there are no experts: every block has one feed-forward for all tokens",
            hint="use units=heads, neurons or blocks, or name other towers with --towers",
        )
    if set(settings.units) == {"neurons"} and not any(block.mlp for block in blocks):
        raise UsageError(
            "there are no neurons to choose from: every block has experts in a feed-forward's place",
            hint="use units=experts, heads or blocks",
        )


def _require_plain(settings: Prune, bundle: Bundle, tower: Tower) -> None:
    for block in tower.blocks if "experts" not in settings.units else ():
        parts = [part for part in (block.attention, block.cross, block.mlp) if part]
        readers = [part.reader for part in parts]
        for path in (*(path for part in parts for path in part.writers), *readers):
            module = bundle.module(path)
            if isinstance(module, LowRankLinear):
                raise UsageError(f"{path} has two factors; prune cuts nn.Linear", hint="put prune before factorize")
            if not isinstance(module, nn.Linear) or is_float_coded(module):
                raise UsageError(
                    f"{path} is a {type(module).__name__}; prune cuts nn.Linear", hint="put prune before quantize"
                )
            if settings.compensate == "bias" and module.bias is None and path in readers:
                raise UsageError(f"{path} has no bias to fold into", hint="use compensate=least-squares or none")
    for kind, widths in (
        ("heads", {block.attention.heads for block in tower.blocks}),
        ("heads", {block.cross.heads for block in tower.blocks if block.cross}),
        ("head-dims", {block.attention.head_dim for block in tower.blocks}),
        ("head-dims", {block.cross.head_dim for block in tower.blocks if block.cross}),
        ("neurons", {block.mlp.neurons for block in tower.blocks if block.mlp}),
        ("experts", {block.experts.experts for block in tower.blocks if block.experts}),
    ):
        if settings.uniform and kind in settings.units and len(widths) > 1:
            raise UsageError(
                f"{tower.name} has blocks of {min(widths)} to {max(widths)} {kind}; uniform needs equal ones",
                hint="use uniform in the first prune step as well",
            )
