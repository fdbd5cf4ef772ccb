"""The score "direct-effect" of `prune`: what a unit itself says of the right answer, through the residual stream alone.

Neurons that say a picture's words in a language model are found by what they write (Schwettmann et al., Multimodal Neurons in
Pretrained Text-Only Transformers, 2023, section 3): the activation a of a unit times its output weights w, projected onto the
words. Where a right word is to be said, ln p(word) would fall by a (w . g) to first order without it if no later block read what
the unit wrote, g being the gradient of ln p(word) with respect to what the last block gives out; so only the last norm and the
output layer are differentiated. A unit's score is E |a (w . g)| over the words of right answers, every sample counting once.

Shape alphabet: B batch, N tokens, T tokens where a word of an answer is to be said, C channels, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.bundle import Bundle, TeacherForced
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context
from mmcompress.passes.prune_effects import answers, backward, slice_size
from mmcompress.passes.prune_scores import by_tower
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.watch import evaluating, watch_gradients, watch_inputs
from mmcompress.views import Tower


def require_direct(bundle: Bundle, towers: Sequence[Tower]) -> None:
    """Raise UsageError for a tower that writes no words, or whose blocks do not simply add to what its output layer reads."""
    answering = bundle.family.answering if isinstance(bundle.family, TeacherForced) else ""
    for tower in towers:
        if tower.name != answering:
            raise UsageError(
                f"score direct-effect is what units say of right answers, and the {tower.name} tower of "
                f"{bundle.family.name} models says nothing",
                hint=f"use --towers {answering}, or another score" if answering else "use score=taylor",
            )
        if tower.residual is None:
            raise UsageError(
                f"score direct-effect follows the residual stream of the {tower.name} tower, and that is not known: "
                f"{tower.why_no_residual}",
                hint="use score=taylor with objective=answers",
            )


def direct_effects(bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """Return E |a (w . g)| of each unit, per group (U,). Raises UsageError without data, and where no sample has an answer."""
    scores: dict[str, Tensor] = {group.reader: torch.zeros(group.units) for group in groups}
    for name, mine in by_tower(groups):
        readers = {group.reader: bundle.module(group.reader) for group in mine}
        tower = bundle.tower(name)
        last = tower.blocks[-1].mlp
        assert last is not None, f"the stream of the {name} tower is known, and not what its last block adds"
        seen: dict[str, Tensor] = {}
        step = slice_size(bundle, name)
        samples = 0

        def add(
            _: str, __: Tensor, gradient: Tensor, mine: Sequence[Group] = mine, seen: dict[str, Tensor] = seen
        ) -> None:
            # What the last block gives out is what its feed-forward adds to: one has the gradient of the other.
            slopes = gradient.float().flatten(0, -2)
            said = slopes.any(dim=1)  # (B * N,): elsewhere no word of an answer is to be said
            for group in mine:
                weight = bundle.layer(group.reader).weight
                assert isinstance(weight, Tensor), f"{group.reader} has no weight"
                effects = seen[group.reader][said].float() * (slopes[said] @ weight.detach().float())  # (T, U * width)
                scores[group.reader] += effects.unflatten(1, (group.units, -1)).sum(2).abs().sum(0)
            seen.clear()

        with (
            evaluating(bundle.model),
            watch_inputs(readers, seen.__setitem__),
            watch_gradients({last.reader: bundle.module(last.reader)}, add, "outputs"),
        ):
            for inputs, differentiate in answers(bundle, name, context, "direct effects"):
                samples += int((bundle.forced.next_tokens(bundle.model, inputs) >= 0).any(1).sum())
                backward(bundle, name, inputs, differentiate, step)
        for group in mine:
            scores[group.reader] /= samples
    return [scores[group.reader] for group in groups]
