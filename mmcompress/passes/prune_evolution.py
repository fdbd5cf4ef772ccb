"""Evolutionary allocation for `prune`: how much each group gives up, by what is measured of the model with that much silenced.

Which units go within a group is the score's business; here only how many do. Each allocation is tried on the model itself, with
the units silenced that would go (`surgery.masking`): their mean is left where what stays is repaired, as folding it into
a bias does, which is less than least squares will do. What is minimised is how far embeddings turn, 1 - cosine, summed up over the
towers that share the budget; of a tower that answers, that is a distance of next-token distributions, the one whose first order
Taylor scores are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.allocation import Layer, Removal, evenly
from mmcompress.ops.evolution import evolve
from mmcompress.passes.base import Context
from mmcompress.passes.prune_effects import stream_by_effect
from mmcompress.passes.prune_scores import tower_batches
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.linears import spread
from mmcompress.surgery.masking import silencing
from mmcompress.surgery.watch import Sums, evaluating


class Evolution:
    """Allocates within a budget by trying; what it tried is in `facts`, one entry for each budget."""

    def __init__(self, bundle: Bundle, context: Context, evaluations: int, samples: int, means: bool) -> None:
        """`means`: silenced units leave their mean behind. `samples`: how many each allocation is tried on, at most."""
        self.bundle, self.evaluations, self.means = bundle, evaluations, means
        self.context = dataclasses.replace(context, num_samples=min(samples, context.num_samples))
        self.facts: list[dict[str, Any]] = []

    def __call__(self, groups: Sequence[Group], layers: Sequence[Layer], remove: int) -> list[list[int]]:
        """Return the kept units of each group. Raises UsageError without data for a tower."""
        damage = Damage(self.bundle, groups, self.context, self.means)
        removal = Removal(layers)
        starts = {"knapsack": removal.greedy(remove), "even": Removal(evenly(layers)).greedy(remove)}
        progress = self.context.progress
        progress.start("evolutionary allocation", self.evaluations)

        def tried(gone: Sequence[int]) -> float:
            found = damage(dict(zip(groups, removal.kept(gone), strict=True)))
            progress.advance(1, f"1 - cosine {found:.2e}")
            return found

        try:
            found = evolve(removal, remove, list(starts.values()), tried, self.evaluations, self.context.seed)
        finally:
            progress.finish()
        self.facts.append(
            {
                "towers": sorted({group.tower for group in groups}),
                "evaluations": found.evaluations,
                "damage": found.damage,
                **{f"damage of {name}": value for name, value in zip(starts, found.started, strict=True)},
            }
        )
        return removal.kept(found.gone)


class Damage:
    """How far the rows of the groups' towers turn when units are silenced."""

    def __init__(self, bundle: Bundle, groups: Sequence[Group], context: Context, means: bool) -> None:
        self.bundle = bundle
        self.readers: dict[str, nn.Module] = {group.reader: bundle.module(group.reader) for group in groups}
        self.instead = self._means(groups, context) if means else {}
        towers = dict.fromkeys(group.tower for group in groups)
        self.inputs = {name: list(tower_batches(bundle, name, context, "allocation")) for name in towers}
        self.whole = {name: self._rows(name) for name in towers}

    def __call__(self, kept: Mapping[Group, Sequence[int]]) -> float:
        """Return the mean of 1 - cosine, summed up over the towers."""
        masks = {group.reader: self._mask(group, units) for group, units in kept.items() if len(units) < group.units}
        total = 0.0
        with silencing(self.readers, masks, self.instead):
            for name, wanted in self.whole.items():
                pairs = zip(self._rows(name), wanted, strict=True)
                turned = [1 - nn.functional.cosine_similarity(rows.double(), whole.double()) for rows, whole in pairs]
                total += float(torch.cat(turned).mean())
        return total

    def _rows(self, tower: str) -> list[Tensor]:
        with evaluating(self.bundle.model):
            return list(self.bundle.encode_all(tower, self.inputs[tower]))

    def _mask(self, group: Group, units: Sequence[int]) -> Tensor:
        device = self.bundle.device
        mask = torch.zeros(group.units * group.width, dtype=torch.bool, device=device)
        mask[spread(torch.tensor(units, dtype=torch.long, device=device), group.width)] = True
        return mask

    def _means(self, groups: Sequence[Group], context: Context) -> dict[str, Tensor]:
        """Return what each reader with a bias reads on average: what a repair leaves in it of a unit that goes."""
        sums = {path: Sums(full=False) for path, reader in self.readers.items() if reader.bias is not None}
        stream_by_effect(self.bundle, sums, context, "means")
        return {path: seen.mean() for path, seen in sums.items() if seen.weight}
