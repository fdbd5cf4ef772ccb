"""A structure found by a primal-dual method: how many units each group gives up and which blocks are skipped, under one budget.

UVC (Yu et al., ICLR 2022, section 3) asks for the weights W, the number s_g of units that group g gives up and the probability k_l
that block l is kept with

    min over W, s, k;  max over y, z >= 0     L(W, k) + sum_g y_g S_g(W, s_g) + z (cost(s, k) - budget)

where S_g is the sum of the ceil(s_g) smallest squared norms of the group's units: units that are to go should have no weight
left. Its steps are

    shrink  the weights of the ceil(s_g) smallest units are divided by 1 + 2 eta y_g (the proximal step of y_g S_g)
    s_g     down along y_g * (the norm of the next unit) + z * dcost/ds_g, the ceiling's gradient taken to be 1 (straight through)
    y_g     up along S_g, z along cost - budget; neither below 0
    k_l     down along dL/dk_l + z * dcost/dk_l, learnt through Gumbel-softmax gates on what the blocks add

Deliberate differences. The paper's step sizes belong to 30 epochs of ImageNet; here no quantity has a unit, so that one set of
rates fits any model, any budget and any number of steps:

- s_g is moved as a share of the group. Costs of groups are relative to their mean, the excess over the budget to what has to go, so
  that it starts at 1. A group's squared norm counts as much as its cost, as it would if all weights were of one size; so a
  unit's is its share of that. What a block does for the loss is relative to the mean block, which counts as much as its cost.
- Rates are per run: time goes from 0 to 1 over a search, and steps fall to 0, without which descent and ascent do not settle. The
  structure makes several steps for one of the weights in a short run.
- y starts at 1: a unit of the group's mean norm, and a block of mean use, are then worth z = 1. From y = 0, groups would give up
  units at the pace of their cost alone until y has grown.
- z follows the excess extrapolated over the time `LEAD`, as in the primal-dual method of Chambolle and Pock (2011): s and z alone
  would circle around the solution, since cost is linear in s.
- Cost counts s_g and not its ceiling, which would jump by a unit in every group as soon as it moves.
- A gate's logit moves along dL/dk, not dL/dlogit (mirror descent), so that gates that are nearly open still learn, at every
  step and along a running mean of dL/dk.

Shape alphabet: G groups, U units of a group, L blocks that may be skipped. Everything is float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHRINK, PRIMAL, DUAL, PRESSURE, GATE = 8.0, 10.0, 5.0, 40.0, 40.0
"""How fast weights, s, y, z and the gates' logits move in the time of one search."""
LEAD = 0.1
TINY = torch.finfo(torch.float64).tiny
TEMPERATURE = 0.5
"""Of the gates (the paper's)."""
OPEN = 3.0
"""Largest logit of a gate, and the first; the least is its negative. Nearer to certainty nothing more would be learnt."""


def least_sums(ordered: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the ceil(`removed`) smallest of each row (G,), and its slope (G,): the next unit.

    ordered: (G, U), rows ascending and then filled up with zeros, at least one; removed: (G,).
    """
    counts = removed.ceil().long()[:, None]
    below = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(1)], 1)
    return below.gather(1, counts)[:, 0], ordered.gather(1, counts)[:, 0]


def pace(step: int, steps: int) -> float:
    """Return how long step `step` of `steps` takes, falling to 0; 1 in all."""
    return (2 * (steps - step) - 1) / steps**2


def shrinking(dual: float, time: float) -> float:
    """Return what the proximal step of y times a squared norm multiplies weights by."""
    return 1 / (1 + 2 * SHRINK * time * dual)


def sampled_gates(logits: Tensor, seed: int) -> Tensor:
    """Return relaxed samples of whether blocks are kept (L,): a Gumbel-softmax of two classes, one of them at logit 0."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    # The difference of two Gumbel variables is logistic.
    return torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / TEMPERATURE)


@dataclass(frozen=True)
class Prices:
    """What there is to remove, and what it costs as shares of the whole."""

    units: Tensor
    """(G,): how many units a group has."""
    most: Tensor
    """(G,): how many of them may go."""
    unit_costs: Tensor
    """(G,)"""
    block: Tensor
    """(G,) int: which of the blocks a group is in, -1 where that cannot be skipped."""
    blocks: Tensor
    """(L,): what a whole block costs."""
    budget: float
    """The share that may be left, below 1."""

    def cost(self, removed: Tensor, keep: Tensor) -> Tensor:
        """Return the share of the cost that is left when groups give up `removed` (G,) units and blocks stay with `keep` (L,)."""
        parts = (self._kept(keep) * self.unit_costs * removed).sum()
        return 1 - parts - ((1 - keep) * self.blocks).sum()

    def savings(self, keep: Tensor) -> Tensor:
        """Return what giving up all of a group would save (G,), relative to the mean group's cost where all blocks stay."""
        return self._kept(keep) * self.units * self.unit_costs / self._mean

    def block_savings(self, removed: Tensor) -> Tensor:
        """Return what skipping a block saves beyond the units it gives up anyway (L,), in the same measure."""
        mine = self.block >= 0
        gone = torch.zeros_like(self.blocks).index_add(0, self.block[mine], (self.unit_costs * removed)[mine])
        return (self.blocks - gone) / self._mean

    def _kept(self, keep: Tensor) -> Tensor:
        return torch.cat([keep, keep.new_ones(1)])[self.block]

    @property
    def _mean(self) -> Tensor:
        return (self.units * self.unit_costs).mean() if len(self.units) else self.blocks.mean()


@dataclass
class PrimalDual:
    """The state of a search: s, y, z and the gates' logits, changed in place."""

    prices: Prices
    removed: Tensor = field(init=False)
    """s (G,), in units."""
    duals: Tensor = field(init=False)
    """y (G,)."""
    pressure: Tensor = field(init=False)
    """z ()."""
    excess: Tensor = field(init=False)
    """() what is too much, as z saw it last: 1 at first, 0 where the budget is met."""
    logits: Tensor = field(init=False)
    """(L,)"""

    def __post_init__(self) -> None:
        self.removed = torch.zeros_like(self.prices.units)
        self.duals = torch.ones_like(self.prices.units)
        self.pressure = torch.zeros((), dtype=torch.float64)
        self.logits = torch.full_like(self.prices.blocks, OPEN)
        self.excess = self._excess()

    @property
    def keep(self) -> Tensor:
        """The probabilities that blocks are kept (L,), stretched so that the bounds of the logits are 0 and 1."""
        return (0.5 + (self.logits.sigmoid() - 0.5) / (2 * torch.sigmoid(self.logits.new_tensor(OPEN)) - 1)).clamp(0, 1)

    @property
    def cost(self) -> float:
        """The share of the cost that is left."""
        return float(self.prices.cost(self.removed, self.keep))

    def advance(self, norms: Sequence[Tensor], slopes: Tensor, time: float, ticks: int) -> None:
        """Make `ticks` steps that take `time` together.

        norms: squared norms of each group's units, (U,) each; slopes: dL/dk (L,), in any unit.
        """
        shares = torch.zeros(len(norms), int(self.prices.units.max()) + 1 if norms else 1, dtype=torch.float64)
        for row, own in zip(shares, norms, strict=True):
            row[: len(own)] = own.sort().values / own.sum().clamp_min(TINY)
        use = -slopes / slopes.abs().mean().clamp_min(TINY)
        for _ in range(ticks):
            self.step(shares, use, time / ticks)

    def step(self, shares: Tensor, use: Tensor, time: float) -> None:
        """Move s and the gates, then y and z, for `time`.

        shares: (G, U), what of a group's squared norm each unit has, as `least_sums` wants it; use: (L,), what keeping a block does
        for the loss, relative to the mean.
        """
        least, following = least_sums(shares, self.removed)
        norms = following * self.prices.units * self.prices.savings(torch.ones_like(self.logits))
        descent = self.duals * norms - self.pressure * self.prices.savings(self.keep)
        worth = use * self.prices.block_savings(torch.zeros_like(self.removed))
        gain = worth - self.pressure * self.prices.block_savings(self.removed)
        moved = self.removed - PRIMAL * time * descent.clamp(-1, 1) * self.prices.units
        self.removed.copy_(moved.clamp_min(0).minimum(self.prices.most))
        self.logits.add_(GATE * time * gain.clamp(-1, 1)).clamp_(-OPEN, OPEN)
        self.duals.add_(DUAL * time * least)
        excess = self._excess()
        extrapolated = time * excess + LEAD * (excess - self.excess)
        self.pressure.add_(PRESSURE * extrapolated).clamp_(min=0)
        self.excess.copy_(excess)

    def _excess(self) -> Tensor:
        return (self.prices.cost(self.removed, self.keep) - self.prices.budget) / (1 - self.prices.budget)
