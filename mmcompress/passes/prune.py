"""prune: remove attention heads, MLP neurons or whole blocks, under one budget across towers.

Units are scored, priced exactly and chosen by `ops.allocation`; their rows and columns are then cut out of the Linears, so the
model is smaller, not masked. What stays can be repaired in closed form from calibration statistics (`ops.reconstruction`). Scores
and statistics all come from the uncut model, in one shot; several prune steps with smaller ratios measure afresh in between.

How scores of different layers compare (`normalise`): with "layer", scores are divided by their layer's mean and a unit is
worth that times its cost, so every layer gives up its relatively least useful units and layers differ by how uneven their
scores are. With "none" scores are taken as the damage of removing a unit, in one currency for all layers and both towers, and
the least damage per parameter or MAC goes first; Taylor scores mean just that. "auto" is "none" for Taylor, "layer" otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.errors import UsageError, closest
from mmcompress.manifest import Json
from mmcompress.passes import prune_scores
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.prune_budget import Bounds, choose, pools, require_possible, worth
from mmcompress.passes.prune_crosscheck import crosscheck
from mmcompress.passes.prune_cut import cut_blocks, cut_heads, cut_neurons, set_parameters
from mmcompress.passes.prune_repair import repaired_readers
from mmcompress.passes.prune_units import (
    Costs,
    Group,
    count_costs,
    count_tokens,
    list_groups,
    read_ranges,
    write_ranges,
)
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.views import Tower

KINDS = ("heads", "neurons", "blocks")
BLOCK_SCORES = ("block-influence", "taylor", "random")


@dataclass(frozen=True)
class Prune:
    """Remove attention heads, MLP neurons or whole blocks, under one budget across towers.

    Cuts rows and columns out of the Linears. Widths may differ from block to block; with `uniform` and without heads, plain
    transformers loads the result.
    """

    name: ClassVar[str] = "prune"

    ratio: float = 0.3
    """Share of the towers' parameters or MACs to remove, embeddings and projections counted in; 0 changes nothing."""
    target: float | None = None
    """Instead of `ratio` and `ratios`: the parameters or MACs all chosen towers may have together afterwards."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Separate ratios for towers, such as vision=0.5,text=0.1; the other towers share `ratio`."""
    budget: Literal["parameters", "macs"] = "parameters"
    """What is counted: parameters, or multiply-accumulates at the family's example input size."""
    units: tuple[str, ...] = ("heads", "neurons")
    """What may go: heads, neurons, or blocks alone."""
    score: Literal["taylor", "activation", "magnitude", "block-influence", "random"] = "taylor"
    """What makes a unit important. Taylor, activation (Wanda) and block-influence need data; random is the control."""
    objective: Literal["embedding", "contrastive"] = "embedding"
    """What Taylor scores differentiate: each embedding by itself (no pairs needed), or the contrastive loss of batches of pairs."""
    normalise: Literal["auto", "layer", "none"] = "auto"
    """How scores of layers compare: relative to their layer, as they are, or (auto) whichever suits the score."""
    compensate: Literal["least-squares", "bias", "none"] = "least-squares"
    """Repair what stays: refit the reading Linears to their outputs in the uncut model, fold the removed mean into their biases,
    or neither. Needs data. Blocks are removed without repair."""
    ridge: float = 0.01
    """Least squares only: how strongly refitted weights are held to the original, relative to the channels' variance."""
    uniform: bool = False
    """The same width in every block of a tower, so that config.json can say it."""
    towers: tuple[str, ...] = ()
    """Towers to prune; empty means all."""
    min_keep: float = 0.1
    """Share of a block's heads and neurons (of a tower's blocks) that always stays; at least one does."""
    multiple: int = 8
    """Neuron counts are rounded to multiples of this, which matrix kernels like. 64 suits int8 kernels (AMX, VNNI)."""
    protect: tuple[int, ...] = ()
    """Blocks never touched, by index in each tower that has so many; negative ones count from the end."""
    crosscheck: bool = False
    """Compare what belongs to a unit with torch-pruning's dependency graph first (needs torch-pruning)."""

    def __post_init__(self) -> None:
        for key, value in {"ratio": self.ratio, **{f"ratios.{k}": v for k, v in self.ratios.items()}}.items():
            if not 0 <= value < 1:
                raise UsageError(f"prune.{key} is {value}; expected 0 <= ratio < 1", hint="it is the share removed")
        if self.target is not None and not 1 <= self.target < math.inf:
            raise UsageError(f"prune.target is {self.target}; expected at least 1", hint=f"it counts {self.budget}")
        if self.target is not None and self.ratios:
            raise UsageError("prune has both target and ratios", hint="give one of them")
        if not 0 <= self.min_keep <= 1:
            raise UsageError(f"prune.min_keep is {self.min_keep}; expected 0..1", hint="it is the share that stays")
        if self.multiple < 1:
            raise UsageError(f"prune.multiple is {self.multiple}; expected at least 1", hint="8 suits most kernels")
        if not 0 <= self.ridge < math.inf:
            raise UsageError(f"prune.ridge is {self.ridge}; expected 0 or more", hint="0.01 is the default")
        unknown = [unit for unit in self.units if unit not in KINDS]
        if unknown or not self.units:
            raise UsageError(f"prune.units is {list(self.units)}", hint=closest(unknown[0] if unknown else "", KINDS))
        if "blocks" in self.units and len(set(self.units)) > 1:
            raise UsageError("prune.units mixes blocks with parts of blocks", hint="use two prune steps, blocks first")
        if ("blocks" in self.units) != (self.score == "block-influence") and self.score not in BLOCK_SCORES[1:]:
            fitting = BLOCK_SCORES if "blocks" in self.units else ("taylor", "activation", "magnitude", "random")
            raise UsageError(
                f"prune.score {self.score} does not rank {' and '.join(self.units)}", hint="use " + ", ".join(fitting)
            )
        if self.uniform and self.protect:
            raise UsageError("prune.uniform and prune.protect contradict each other", hint="drop one of them")

    def control(self, decisions: Mapping[str, Any] | None = None) -> Prune | None:
        """Return the pass that removes as much at random, repaired the same way."""
        return None if self.score == "random" else dataclasses.replace(self, score="random")

    def streams(self) -> bool:
        """Whether scores come from one block's weights at a time, and nothing is repaired."""
        repairs = self.compensate != "none" and "blocks" not in self.units
        return self.score in ("magnitude", "random") and not repairs and not self.crosscheck

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """One look at the samples for the scores, with gradients for Taylor's, and two for the repair."""
        scores = {"taylor": 3, "activation": 1, "block-influence": 1}.get(self.score, 0)
        repair = 2 if self.compensate != "none" and "blocks" not in self.units else 0
        return (scores + repair) * work.samples * work.forward

    def check(self, bundle: Bundle) -> None:
        """Refuse towers, modules and ratios this cannot work on."""
        towers = self._chosen(bundle)
        if self.score == "taylor" and self.objective == "contrastive" and not isinstance(bundle.family, DualEncoder):
            raise UsageError(
                f"prune.objective is contrastive, and {bundle.family.name} models embed nothing into a shared space",
                hint="use objective=embedding",
            )
        for tower in towers:
            self._require_plain(bundle, tower)
        if "blocks" in self.units and any(record.name == "merge-tokens" for record in bundle.history):
            raise UsageError(
                "tokens are already merged, with a schedule per block; removing blocks would break it",
                hint="put prune before merge-tokens",
            )
        for tower in towers:
            whole = [part.why_whole for block in tower.blocks for part in (block.attention, block.cross) if part]
            if set(self.units) == {"heads"} and all(whole):
                raise UsageError(
                    f"heads of the {tower.name} tower cannot be removed: {whole[0]}",
                    hint="prune its neurons or blocks, or name other towers with --towers",
                )
            if "blocks" in self.units and tower.why_fixed_depth:
                raise UsageError(
                    f"blocks of the {tower.name} tower cannot be removed: {tower.why_fixed_depth}",
                    hint="prune its heads and neurons, or name other towers with --towers",
                )
        self._survey(bundle, towers)
        if self.crosscheck:
            crosscheck(bundle, towers)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Score, price and choose; with `compensate`, also compute the new readers."""
        towers = self._chosen(bundle)
        totals, groups, bounds, wanted = self._survey(bundle, towers)
        chosen: dict[Group, list[int]] = {}
        if wanted:
            names = {name for pool in wanted for name in pool.towers}
            groups = [group for group in groups if group.tower in names]
            values = worth(groups, self._scores(bundle, groups, context), self._normalise(), self.budget)
            for pool in wanted:
                chosen |= choose(bundle.family.name, pool, groups, values, bounds, self.budget)
        cut = {group: kept for group, kept in chosen.items() if len(kept) < group.units}
        tensors: dict[str, Tensor] = {}
        if cut and self.compensate != "none" and "blocks" not in self.units:
            tensors = repaired_readers(bundle, cut, context, self.compensate, self.ridge)
        return Plan(_decisions(totals, cut, bounds), tensors)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Cut what was decided, in place."""
        kept = plan.decisions["kept"]
        for tower in bundle.towers():
            for block in tower.blocks:
                key = f"{tower.name}.{block.index}"
                for place, attention in ((key, block.attention), (f"{key}.cross", block.cross)):
                    if attention and place in kept["heads"]:
                        cut_heads(bundle, attention, read_ranges(kept["heads"][place]))
                if key in kept["neurons"]:
                    cut_neurons(bundle, block.mlp, read_ranges(kept["neurons"][key]))
                give_back_freed()
            if tower.name in kept["blocks"]:
                cut_blocks(bundle, tower, read_ranges(kept["blocks"][tower.name]))
        set_parameters(bundle, plan.tensors)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing; recount what the cut model costs."""
        return {"recount": {tower.name: asdict(count_costs(bundle, tower)) for tower in self._chosen(bundle)}}

    def _chosen(self, bundle: Bundle) -> list[Tower]:
        for name in self.ratios:
            if self.towers and name not in self.towers:
                raise UsageError(
                    f"prune.ratios names '{name}', prune.towers does not", hint="name it in both or neither"
                )
        for name in (*self.towers, *self.ratios):
            bundle.tower(name)
        return [tower for tower in bundle.towers() if not self.towers or tower.name in self.towers]

    def _require_plain(self, bundle: Bundle, tower: Tower) -> None:
        for block in tower.blocks:
            parts = [part for part in (block.attention, block.cross, block.mlp) if part]
            readers = [part.reader for part in parts]
            for path in (*(path for part in parts for path in part.writers), *readers):
                module = bundle.module(path)
                if not isinstance(module, nn.Linear) or is_float_coded(module):
                    raise UsageError(
                        f"{path} is a {type(module).__name__}; prune cuts nn.Linear", hint="put prune before quantize"
                    )
                if self.compensate == "bias" and module.bias is None and path in readers:
                    raise UsageError(f"{path} has no bias to fold into", hint="use compensate=least-squares or none")
        for kind, widths in (
            ("heads", {block.attention.heads for block in tower.blocks}),
            ("heads", {block.cross.heads for block in tower.blocks if block.cross}),
            ("neurons", {block.mlp.neurons for block in tower.blocks}),
        ):
            if self.uniform and kind in self.units and len(widths) > 1:
                raise UsageError(
                    f"{tower.name} has blocks of {min(widths)} to {max(widths)} {kind}; uniform needs equal ones",
                    hint="use uniform in the first prune step as well",
                )

    def _survey(self, bundle: Bundle, towers: Sequence[Tower]) -> tuple[Any, ...]:
        """Return what the towers cost, their groups, bounds and pools. Raises UsageError when the budget cannot be met."""
        totals = {tower.name: count_costs(bundle, tower) for tower in towers}
        tokens = {path: count for tower in towers for path, count in count_tokens(bundle, tower).items()}
        depth = max(len(tower.blocks) for tower in towers)
        for index in self.protect:
            if not -depth <= index < depth:
                raise UsageError(
                    f"prune.protect names block {index}, and no tower has more than {depth} blocks",
                    hint=f"use 0 to {depth - 1}, or -1 for the last",
                )
        groups = list_groups(bundle, towers, self.units, self.protect, tokens)
        if not groups:
            raise UsageError("prune matched nothing: every block is protected", hint="protect fewer blocks")
        bounds = Bounds(self.min_keep, self.multiple, self.uniform, {tower.name: len(tower.blocks) for tower in towers})
        wanted = pools(totals, self.budget, self.ratio, self.target, self.ratios)
        for pool in wanted:
            require_possible(bundle.family.name, pool, groups, bounds, self.budget)
        return totals, groups, bounds, wanted

    def _scores(self, bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
        scores = self._measured(bundle, groups, context)
        for group, found in zip(groups, scores, strict=True):
            if not found.isfinite().all():
                raise UsageError(
                    f"the {self.score} score of {group.kind} in {group.tower} block {group.block} is not finite",
                    hint="the model overflows on this data: load it in float32, or leave bad samples out",
                )
        return scores

    def _measured(self, bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
        if self.score == "random":
            return prune_scores.uniform_random(groups, context.seed)
        if self.score == "magnitude":
            return prune_scores.magnitude(bundle, groups)
        if self.score == "activation":
            return prune_scores.activation(bundle, groups, context, centred=self.compensate != "none")
        if self.score == "block-influence":
            return prune_scores.block_influence(bundle, groups, context)
        return prune_scores.taylor(bundle, groups, context, self.objective)

    def _normalise(self) -> str:
        if self.score == "random":
            return "cost"
        if self.normalise != "auto":
            return self.normalise
        return "none" if self.score == "taylor" else "layer"


def _decisions(totals: dict[str, Costs], cut: dict[Group, list[int]], bounds: Bounds) -> dict[str, Json]:
    """Return the kept units of every group that loses some, and what each tower costs before and after."""
    kept: dict[str, dict[str, str]] = {"heads": {}, "neurons": {}, "blocks": {}}
    after = {name: [costs.parameters, costs.macs] for name, costs in totals.items()}
    gone_blocks: dict[str, set[int]] = {}
    for group, indices in cut.items():
        after[group.tower][0] -= group.cost.parameters * (group.units - len(indices))
        after[group.tower][1] -= group.cost.macs * (group.units - len(indices))
        if group.kind == "blocks":
            gone_blocks.setdefault(group.tower, set()).add(group.block)
        else:
            kept[group.kind][group.key] = write_ranges(indices)
    for name, gone in gone_blocks.items():
        kept["blocks"][name] = write_ranges([index for index in range(bounds.depths[name]) if index not in gone])
    return {
        "kept": kept,
        "before": {name: asdict(costs) for name, costs in totals.items()},
        "after": {name: asdict(Costs(*costs)) for name, costs in after.items()},
    }
