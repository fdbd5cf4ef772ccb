"""The pace of `search-prune` with method uvc: `ops.primal_dual` finds which heads, neurons and blocks go while weights train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops.primal_dual import TEMPERATURE, Prices, PrimalDual, pace, sampled_gates, shrinking
from mmcompress.passes.distill_pace import Pace
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.prune_budget import Bounds, Pool, choose
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.gates import Gates

BEGIN, SETTLED = 0.1, 0.7
"""Shares of the steps: until the first nothing but weights moves, from the second on what was found is fixed."""
TICKS = 400
"""Steps of the structure in one search, at least: one costs nothing beside a step of the weights."""


@dataclass
class Part:
    """One pool's share of the work."""

    pool: Pool
    groups: list[Group]
    """Heads and neurons."""
    blocks: list[Group]
    state: PrimalDual
    slopes: Tensor
    """(L,) what dL/dk of the blocks has added up to, the older the less."""

    @classmethod
    def of(cls, pool: Pool, groups: Sequence[Group], bounds: Bounds, measure: str) -> Part:
        """Price what may go; costs are shares of the pool's towers."""
        mine = [group for group in groups if group.tower in pool.towers]
        parts = [group for group in mine if group.kind != "blocks"]
        blocks = [group for group in mine if group.kind == "blocks"]
        places = {(group.tower, group.block): index for index, group in enumerate(blocks)}
        widths = [bounds.smallest(group, measure) for group in parts]
        prices = Prices(
            units=_doubles(group.units for group in parts),
            most=_doubles(group.units - width for group, width in zip(parts, widths, strict=True)),
            unit_costs=_doubles(group.cost.of(measure) / pool.total for group in parts),
            block=torch.tensor([places.get((group.tower, group.block), -1) for group in parts], dtype=torch.long),
            blocks=_doubles(group.cost.of(measure) / pool.total for group in blocks),
            budget=1 - pool.remove / pool.total,
        )
        return cls(pool, parts, blocks, PrimalDual(prices), torch.zeros_like(prices.blocks))


@dataclass
class Joint(Pace):
    """Shrinks the units that are to go and moves the structure, after every step; what blocks do is a mean over `interval` of them.

    What is found is brought to the budget before the end; from then on its weights are 0 and its blocks skipped, and the rest
    trains on without it.
    """

    family: str
    interval: int
    groups: Sequence[Group]
    pools: Sequence[Pool]
    bounds: Bounds
    measure: str
    model: nn.Module
    gates: Gates
    """Of the blocks that may go."""
    ranks: Ranks
    seed: int
    parts: list[Part] = field(init=False)
    kept: dict[Group, Tensor] = field(init=False)
    """(U,) 1 for a unit that stays, else 0; all 1 until it is settled."""

    def __post_init__(self) -> None:
        self.parts = [Part.of(pool, self.groups, self.bounds, self.measure) for pool in self.pools]
        self.kept = {group: torch.ones(group.units) for group in self.groups}

    @torch.no_grad()
    def before(self, step: int, steps: int) -> None:
        """Set the gates: open at first, then drawn, at last open or closed. Forget gradients of what was only timed."""
        self.gates.take_gradients()
        begin, end = phases(steps)
        for number, part in enumerate(self.parts):
            drawn = sampled_gates(part.state.logits, self.seed + step * len(self.parts) + number)
            for index, block in enumerate(part.blocks):
                gate = drawn[index : index + 1] if begin <= step < end else self.kept[block]
                self.gates.set(block.reader, gate)

    @torch.no_grad()
    def after(self, step: int, steps: int) -> None:
        """Shrink, and move the structure; settle it when its time is over."""
        begin, end = phases(steps)
        if begin <= step < end:
            slopes = self._slopes(step)
            steps, ticks = end - begin, math.ceil(TICKS / (end - begin))
            for part in self.parts:
                self._shrink(part, 1 / steps)
                new = torch.tensor([slopes[block.reader] for block in part.blocks], dtype=torch.float64)
                part.slopes.mul_(1 - 1 / self.interval).add_(new)
                norms = [self._norms(group) for group in part.groups]
                part.state.advance(norms, part.slopes, pace(step - begin, steps), ticks)
        if step + 1 == end:
            self._settle()
        if step + 1 >= end:
            for group, kept in self.kept.items():
                if group.kind != "blocks" and not kept.all():
                    self._scale(group, kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return the structure, and what was settled."""
        made = {f"kept {group.kind} {group.key}": kept for group, kept in self.kept.items()}
        for number, part in enumerate(self.parts):
            state = part.state
            for name, value in (
                ("removed", state.removed),
                ("duals", state.duals),
                ("pressure", state.pressure),
                ("excess", state.excess),
                ("logits", state.logits),
                ("slopes", part.slopes),
            ):
                made[f"{name} {number}"] = value
        return made

    def cut(self) -> dict[Group, list[int]]:
        """Return the units that stay, of each group that loses some."""
        return {group: kept.nonzero().flatten().tolist() for group, kept in self.kept.items() if not kept.all()}

    def facts(self) -> dict[str, Any]:
        """Return where the search ended before it was rounded, for each budget."""
        return {
            "search": [
                {
                    "towers": list(part.pool.towers),
                    "multiplier": round(float(part.state.pressure), 4),
                    "cost": round(part.state.cost, 4),
                    "budget": round(part.state.prices.budget, 4),
                    "keep": {
                        block.key: round(float(keep), 4)
                        for block, keep in zip(part.blocks, part.state.keep, strict=True)
                    },
                }
                for part in self.parts
            ]
        }

    def _slopes(self, step: int) -> dict[str, float]:
        """Return dL/dk of every block: dL/dlogit through the gate that was drawn, without the factor k (1 - k) of the logit."""
        taken = self.gates.take_gradients()
        if not taken:
            return {}
        paths = list(taken)
        mean = self.ranks.gather(torch.cat([taken[path] for path in paths])[None]).mean(0).double().cpu()
        found = {}
        for path, slope in zip(paths, mean, strict=True):
            if not slope.isfinite():
                raise UsageError(
                    f"the gate of {path} has a gradient that is not finite at step {step + 1}",
                    hint="lower the learning_rate, or set amp: false",
                )
            gate = float(self.gates.values[path])
            found[path] = float(slope) * gate * (1 - gate) / TEMPERATURE
        for part in self.parts:
            for block, chance in zip(part.blocks, part.state.logits.sigmoid().tolist(), strict=True):
                found[block.reader] /= chance * (1 - chance)
        return found

    def _shrink(self, part: Part, time: float) -> None:
        for group, removed, dual in zip(
            part.groups, part.state.removed.tolist(), part.state.duals.tolist(), strict=True
        ):
            if removed > 0:
                factors = torch.ones(group.units)
                least = self._norms(group).argsort(stable=True)[: math.ceil(removed)]
                factors[least] = shrinking(dual, time)
                self._scale(group, factors)

    def _settle(self) -> None:
        """Choose what goes: what was found, evenly more or less of it where rounding asks for it."""
        for part in self.parts:
            values = []
            for group, removed in zip(part.groups, part.state.removed.tolist(), strict=True):
                ranks = self._norms(group).argsort(stable=True).argsort().double()
                # From -1 for what surely goes to 1 for what surely stays; 2 more make all values positive.
                density = (ranks + 0.5 - removed) / group.units
                values.append((2 + density) * group.cost.of(self.measure))
            for block, keep in zip(part.blocks, part.state.keep.tolist(), strict=True):
                values.append(torch.tensor([(2 + keep - 0.5) * block.cost.of(self.measure)], dtype=torch.float64))
            groups = [*part.groups, *part.blocks]
            for group, kept in choose(self.family, part.pool, groups, values, self.bounds, self.measure).items():
                self.kept[group].zero_()[kept] = 1

    def _norms(self, group: Group) -> Tensor:
        """Return the squared norms of the reader's columns of each unit (U,), in float64 on the CPU."""
        weight = self.model.get_parameter(f"{group.reader}.weight")
        return weight.square().sum(0).view(group.units, -1).sum(1).double().cpu()

    def _scale(self, group: Group, factors: Tensor) -> None:
        weight = self.model.get_parameter(f"{group.reader}.weight")
        weight.mul_(factors.to(weight).repeat_interleave(group.width))


def phases(steps: int) -> tuple[int, int]:
    """Return the step with which the search begins, and the one before which it is settled."""
    begin = int(BEGIN * steps)
    return begin, max(begin + 1, math.ceil(SETTLED * steps))


def _doubles(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
