"""The pace of `search-prune`: which gates close at which step, from what their gradients have added up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmcompress.errors import UsageError
from mmcompress.ops.progressive import progress
from mmcompress.passes.distill_pace import Pace
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.prune_budget import Bounds, Pool, choose, worth
from mmcompress.passes.prune_scores import uniform_random
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.gates import Gates


@dataclass
class Search(Pace):
    """Chooses after every `interval` steps, and after the last, and closes the gates of what is chosen."""

    family: str
    method: str
    interval: int
    groups: Sequence[Group]
    pools: Sequence[Pool]
    bounds: Bounds
    measure: str
    gates: Gates
    ranks: Ranks
    seed: int
    sums: dict[str, Tensor] = field(init=False)
    """By reader: what gradients (or their squares) have added up to, (U,)."""

    def __post_init__(self) -> None:
        self.sums = {path: torch.zeros_like(gates) for path, gates in self.gates.values.items()}

    def before(self, step: int, steps: int) -> None:
        """Forget gradients of what was only timed."""
        self.gates.take_gradients()

    @torch.no_grad()
    def after(self, step: int, steps: int) -> None:
        """Add this step's gradients; choose where it is time."""
        found = self.gates.take_gradients()
        # Of several processes each has the share of its own samples; the mean over processes is what the weights learn from.
        joined = torch.cat(list(found.values()))
        mean = self.ranks.gather(joined[None]).mean(0)
        for path, gradient in zip(found, mean.split([len(part) for part in found.values()]), strict=True):
            if not gradient.isfinite().all():
                raise UsageError(
                    f"the gates of {path} have gradients that are not finite at step {step + 1}",
                    hint="lower the learning_rate, or set amp: false",
                )
            self.sums[path] += gradient.square() if self.method == "fisher" else gradient
        if (step + 1) % self.interval == 0 or step + 1 == steps:
            self._close(progress(step, steps))

    def tensors(self) -> dict[str, Tensor]:
        """Return sums and gates."""
        sums = {f"sum {path}": value for path, value in self.sums.items()}
        return sums | {f"gates {path}": value for path, value in self.gates.values.items()}

    def cut(self) -> dict[Group, list[int]]:
        """Return the units that stay, of each group whose gates are not all open."""
        open_ = {group: self.gates.values[group.reader].detach() > 0 for group in self.groups}
        return {group: kept.nonzero().flatten().tolist() for group, kept in open_.items() if not kept.all()}

    def facts(self) -> dict[str, Any]:
        """Return nothing: what was chosen says it all."""
        return {}

    def _close(self, reached: float) -> None:
        """Close the gates of what the share `reached` of the budget takes to 1 - `reached`; open all others."""
        for group, kept in self._chosen(reached).items():
            gates = torch.full((group.units,), 1 - reached)
            gates[kept] = 1.0
            self.gates.set(group.reader, gates)

    def _chosen(self, reached: float) -> Mapping[Group, list[int]]:
        if self.method == "random":
            values = worth(self.groups, uniform_random(self.groups, self.seed), "cost", self.measure)
        else:
            # The gate that would raise the loss most by opening goes first; of squares, the one that matters least.
            sign = 1 if self.method == "fisher" else -1
            scores = [sign * self.sums[group.reader].cpu() for group in self.groups]
            values = worth(self.groups, scores, "none" if self.method == "fisher" else "kind", self.measure)
        chosen: dict[Group, list[int]] = {}
        for pool in self.pools:
            part = replace(pool, remove=int(pool.remove * reached) if reached < 1 else pool.remove)
            chosen |= choose(self.family, part, self.groups, values, self.bounds, self.measure)
        return chosen
