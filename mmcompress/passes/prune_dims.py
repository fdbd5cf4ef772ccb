"""Channels of heads as units of `prune` ("head-dims"): all heads of an attention become narrower, by as many channels each.

Which channels a head has is arbitrary: its logits q'k stay the same when queries are multiplied by T and keys by T^-T, its values
when they are by another T and the reader's columns by that one's inverse. So every head is first turned, which changes nothing, to
the directions in which least is lost when the last ones go:

- logits: with queries of second moment A A and keys of covariance B B (a constant that all keys share moves no softmax), A B =
  U S V'; leaving out the i-th direction costs the mean square S_i^2 of the logits, which no other choice of as few undercuts;
- values: with the head's outputs of covariance C and the reader's columns W, W C^1/2 = U S V', and S_i^2 is the mean square of
  what the reader gives out.

Unit i is direction i of all heads of one attention, of logits and values together. Its score is the first-order effect of one gate
on both (`prune_effects`). Scores without data take the channels as they are.

Logits are divided by the square root of a head's width, by many classes from its current width: the queries take up the difference.

Sources: heads' products as low-rank factors, e.g. SVD-LLM (Wang et al. 2024) for single Linears; UPop (Shi et al. 2023) and UVC (Yu
et al. 2022) cut channels of heads as they are.

Shape alphabet: B batch, N tokens, C channels, H heads, D head width, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.reconstruction import Moments, repair
from mmcompress.ops.turning import logit_turns, value_turns
from mmcompress.passes.base import Context
from mmcompress.passes.prune_effects import SUMMARIES, stream_by_effect, walk_backward
from mmcompress.passes.prune_scores import by_tower, stream_inputs
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.linears import in_every_head
from mmcompress.surgery.watch import Sums, evaluating, watch_gradients


@dataclass(frozen=True)
class Turn:
    """What the heads of one attention are multiplied by, and what undoes that: (H, D, D) each, in float64."""

    queries: Tensor
    queries_back: Tensor
    keys: Tensor
    values: Tensor
    values_back: Tensor

    @staticmethod
    def none(group: Group) -> Turn:
        """Leave the channels as they are."""
        same = torch.eye(group.units, dtype=torch.float64).expand(group.width, -1, -1)
        return Turn(same, same, same, same, same)


def effects_of_dims(
    bundle: Bundle, groups: Sequence[Group], context: Context, objective: str, score: str
) -> list[Tensor]:
    """Return one summary of each direction's first-order effects on the objective, per group (U,)."""
    turns, _ = turned(bundle, groups, context)
    found = _Effects(bundle, groups, turns)
    for name, mine in by_tower(groups):
        readers = {group.reader: bundle.module(group.reader) for group in mine}
        queries = {group.writers[0]: bundle.module(group.writers[0]) for group in mine}
        with (
            evaluating(bundle.model),
            watch_gradients(readers, found.add_values),
            watch_gradients(queries, found.add_queries, "outputs"),
        ):
            found.packed = bundle.tower(name).packed
            walk_backward(bundle, name, context, objective)
    return found.summary(score)


class _Effects:
    """Gate gradients per unit. In a backward pass, values come before the queries of the same attention."""

    def __init__(self, bundle: Bundle, groups: Sequence[Group], turns: Mapping[Group, Turn]) -> None:
        self.groups, self.bundle, self.packed = groups, bundle, False
        self.turns = {group.reader: turns[group] for group in groups}
        self.readers = {group.writers[0]: group.reader for group in groups}
        self.waiting: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add_values(self, path: str, states: Tensor, gradient: Tensor) -> None:
        turn = self.turns[path]
        self.waiting[path] = self._effect(states, gradient, turn.values, turn.values_back)

    def add_queries(self, path: str, states: Tensor, gradient: Tensor) -> None:
        reader, made = self.readers[path], self.bundle.module(path)(states)
        turn = self.turns[reader]
        effect = self.waiting.pop(reader) + self._effect(made, gradient, turn.queries, turn.queries_back)
        sums = torch.stack([effect.square().sum(0), effect.sum(0), effect.abs().sum(0)])
        self.totals[reader] = self.totals[reader] + sums if reader in self.totals else sums
        self.counts[reader] = self.counts.get(reader, 0) + len(effect)

    def _effect(self, states: Tensor, gradient: Tensor, turn: Tensor, back: Tensor) -> Tensor:
        """Return sum x * dL/dx of the turned channels over tokens and heads: (B, U).

        With G = sum x g' of a sample's tokens, that is the diagonal of T G T^-1.
        """
        rows = 1 if self.packed else len(states)
        heads, width, _ = turn.shape
        seen, slope = (each.detach().float().reshape(rows, -1, heads, width) for each in (states, gradient))
        outer = torch.einsum("bnhd,bnhe->bhde", seen, slope)
        return torch.einsum("hud,bhde,heu->bu", turn.to(outer), outer, back.to(outer))

    def summary(self, score: str) -> list[Tensor]:
        """Return one number per unit (U,); 0 where nothing that the tower gives out depends on it."""
        row = SUMMARIES.index(score)
        return [
            (self.totals[g.reader][row] / self.counts[g.reader]).abs()
            if g.reader in self.totals
            else torch.zeros(g.units)
            for g in self.groups
        ]


def turned(bundle: Bundle, groups: Sequence[Group], context: Context) -> tuple[dict[Group, Turn], dict[Group, Sums]]:
    """Return how the heads of each attention are turned, and what its reader is given, weighted by its effect.

    Memory: one second moment (C, C) for what queries and keys are made of, and one for each reader.
    """
    sums = {path: Sums(full=True) for group in groups for path in group.writers[:2]}
    stream_inputs(bundle, sums, context, "head directions")
    read = {group.reader: Sums(full=True) for group in groups}
    stream_by_effect(bundle, read, context, "head directions")
    turns = {}
    for group in groups:
        query, key = (_moments(bundle, group, path, sums[path]) for path in group.writers[:2])
        queries, back, keys = logit_turns(query.second, key.second - _outer(key.mean))
        values = values_back = Turn.none(group).values
        if read[group.reader].weight:  # else nothing that the tower gives out depends on it
            seen = _of_heads(group, read[group.reader])
            values, values_back = value_turns(_columns(bundle, group), seen.second - _outer(seen.mean))
        turns[group] = Turn(queries, back, keys, values, values_back)
    return turns, {group: read[group.reader] for group in groups}


@dataclass(frozen=True)
class _Heads:
    """Moments of each head's channels."""

    mean: Tensor
    """(H, D)"""
    second: Tensor
    """(H, D, D)"""


def _moments(bundle: Bundle, group: Group, path: str, seen: Sums) -> _Heads:
    """Return the moments of what a writer gives out, from those of what it is given."""
    linear = bundle.module(path)
    weight = linear.get_parameter("weight").detach().double().unflatten(0, (-1, group.units))  # (H, D, C)
    bias = weight.new_zeros(weight.shape[:2]) if linear.bias is None else linear.get_parameter("bias").detach().double()
    bias = bias.reshape(weight.shape[:2])
    mean, second = seen.mean().double(), seen.second_moment().double()
    plain = weight @ mean  # (H, D)
    cross = plain[:, :, None] * bias[:, None]
    return _Heads(plain + bias, weight @ second @ weight.mT + cross + cross.mT + _outer(bias))


def _of_heads(group: Group, seen: Sums) -> _Heads:
    """Return the moments of each head among those of all columns of a reader."""
    second = seen.second_moment().double().reshape(group.width, group.units, group.width, group.units)
    own = torch.arange(group.width)
    return _Heads(seen.mean().double().reshape(group.width, group.units), second[own, :, own])


def _columns(bundle: Bundle, group: Group) -> Tensor:
    """Return the reader's columns of each head (H, out, D), in float64."""
    weight = bundle.module(group.reader).get_parameter("weight").detach().double()
    return weight.unflatten(1, (group.width, group.units)).transpose(0, 1)


def _outer(vectors: Tensor) -> Tensor:
    return vectors[..., :, None] * vectors[..., None, :]


def narrowed_heads(
    bundle: Bundle, kept: Mapping[Group, Sequence[int]], context: Context, turn: bool, method: str, ridge: float
) -> dict[str, Tensor]:
    """Return weights and biases of the narrower q, k, v and readers, by parameter name.

    `turn`: whether channels are directions of the turned heads, else those that are there. Readers are repaired by `method` as
    others are (`prune_repair`), from what the kept directions of the uncut model give them.
    """
    groups = list(kept)
    turns = {group: Turn.none(group) for group in groups}
    read: dict[Group, Sums] = {}
    if turn:
        turns, read = turned(bundle, groups, context)
    elif method != "none":
        sums = {group.reader: Sums(full=method == "least-squares") for group in groups}
        stream_by_effect(bundle, sums, context, f"compensate={method}")
        read = {group: sums[group.reader] for group in groups}
    tensors: dict[str, Tensor] = {}
    for group in groups:
        units = torch.tensor(kept[group])
        tensors |= _writers(bundle, group, units, turns[group])
        tensors |= _reader(bundle, group, units, turns[group], read.get(group), method, ridge)
    return tensors


def _writers(bundle: Bundle, group: Group, units: Tensor, turn: Turn) -> dict[str, Tensor]:
    """Return the turned rows of q, k and v that stay; queries make up for the factor of the logits that follows the width."""
    factor = (len(units) / group.units) ** 0.5
    made: dict[str, Tensor] = {}
    for path, by in zip(group.writers, (turn.queries * factor, turn.keys, turn.values), strict=True):
        for name, parameter in bundle.module(path).named_parameters(recurse=False):
            rows = parameter.detach().double().unflatten(0, (-1, group.units))
            own = by[:, units].to(rows.device)
            turned_rows = own @ rows if parameter.dim() == 2 else (own @ rows[..., None]).squeeze(-1)
            made[f"{path}.{name}"] = turned_rows.flatten(0, 1).to(parameter.dtype)
    return made


def _reader(
    bundle: Bundle, group: Group, units: Tensor, turn: Turn, seen: Sums | None, method: str, ridge: float
) -> dict[str, Tensor]:
    """Return the reader of the turned values that stay, repaired."""
    linear = bundle.module(group.reader)
    assert isinstance(linear, nn.Linear), f"{group.reader} was not checked to be a Linear"
    device = linear.weight.device
    weight = (_columns(bundle, group) @ turn.values_back.to(device)).transpose(0, 1).flatten(1)  # (out, H * D)
    columns = in_every_head(units.to(device), group.width, group.units)
    if method == "none" or seen is None or not seen.weight:
        return {f"{group.reader}.weight": weight[:, columns].to(linear.weight.dtype)}
    by = torch.block_diag(*turn.values.to(device))
    second = by @ seen.second_moment().double() @ by.T if seen.full and method == "least-squares" else None
    moments = Moments(by @ seen.mean().double(), second, seen.count)
    bias = None if linear.bias is None else linear.bias.detach()
    new, moved = repair(weight, bias, columns, moments, ridge)
    made = {f"{group.reader}.weight": new.to(linear.weight.dtype)}
    return made if moved is None else {**made, f"{group.reader}.bias": moved}
