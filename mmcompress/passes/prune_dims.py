"""Channels of heads as units of `prune` ("head-dims"): all heads of an attention become narrower, by as many channels each.

Which channels a head has is arbitrary: its logits q'k stay the same when queries are multiplied by T and keys by T^-T, its values
when they are by another T and the reader's columns by that one's inverse. So every head is first turned, which changes nothing, to
the directions in which least is lost when the last ones go:

- logits: with queries of second moment A A and keys of covariance B B (a constant that all keys share moves no softmax), A B =
  U S V'; leaving out the i-th direction costs the mean square S_i^2 of the logits, which no other choice of as few undercuts;
- values: with the head's outputs of covariance C and the reader's columns W, W C^1/2 = U S V', and S_i^2 is the mean square of
  what the reader gives out.

Unit i is direction i of all heads of one attention, of logits and values together, and the last ones go first. How many go of
which attention is found out by trying (`displacements`): each attention alone is cut to a ladder of widths, and what the embeddings
move is what its directions are worth, in the unit of Taylor scores, mean |du|^2. First-order effects of gates on directions say
nothing of it: softmax bears a few of them going and breaks down with many (Whisper's decoder did, cut by them).
Scores without data take the channels as they are.

Logits are divided by the square root of a head's width, by many classes from its current width: the queries take up the difference.

Sources: heads' products as low-rank factors, e.g. SVD-LLM (Wang et al. 2024) for single Linears; UPop (Shi et al. 2023) and UVC (Yu
et al. 2022) cut channels of heads as they are.

Shape alphabet: B batch, N tokens, C channels, H heads, D head width, U units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops.importance import non_decreasing
from mmcompress.ops.reconstruction import Moments, repair
from mmcompress.ops.turning import logit_turns, value_turns
from mmcompress.passes.base import Context
from mmcompress.passes.prune_effects import stream_by_effect
from mmcompress.passes.prune_scores import by_tower, stream_inputs, tower_batches
from mmcompress.passes.prune_units import Group
from mmcompress.surgery.linears import in_every_head
from mmcompress.surgery.watch import Sums, evaluating

SHARES = (7 / 8, 3 / 4, 1 / 2, 1 / 4)
"""Widths of an attention that are tried, as shares of what it has: what is lost grows faster than what goes."""


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


def displacements(
    bundle: Bundle, groups: Sequence[Group], context: Context, multiple: int, samples: int, means: bool
) -> list[Tensor]:
    """Return what each direction is worth by trial, per group (U,): none less than the one behind it.

    `multiple`: widths that may stay are multiples of it; some (`ladder`) are tried, each on `samples` samples at most.
    `means`: what goes of values leaves its mean behind, as a repair lets it. Memory: the rows of the samples, twice.
    """
    turns, read = turned(bundle, groups, context)
    few = dataclasses.replace(context, num_samples=min(samples, context.num_samples))
    worth: dict[Group, Tensor] = {}
    for name, mine in by_tower(groups):
        inputs = list(tower_batches(bundle, name, few, "trials"))

        def rows(name: str = name, inputs: list[dict[str, Tensor]] = inputs) -> list[Tensor]:
            with evaluating(bundle.model):
                return [nn.functional.normalize(found.double(), dim=-1) for found in bundle.encode_all(name, inputs)]

        whole = rows()
        ladders = {group: ladder(group.units, multiple) for group in mine}
        context.progress.start(f"{name} trials", sum(map(len, ladders.values())))
        try:
            for group, widths in ladders.items():
                moved = []
                for width in widths:
                    seen = read[group] if means and bundle.module(group.reader).bias is not None else None
                    with _narrowed(bundle, group, turns[group], width, seen):
                        squares = [(found - own).square().sum(-1) for found, own in zip(rows(), whole, strict=True)]
                    moved.append(float(torch.cat(squares).mean()))
                    context.progress.advance(1, f"{group.key} {width} of {group.units}: {moved[-1]:.2e}")
                worth[group] = by_width(moved, widths, group.units)
        finally:
            context.progress.finish()
    return [worth[group] for group in groups]


def ladder(units: int, multiple: int) -> list[int]:
    """Return the widths below `units` to try, the largest first: multiples of `multiple`, close to SHARES of the units."""
    widths = {math.floor(share * units / multiple) * multiple for share in SHARES}
    return sorted(widths - {0, units}, reverse=True)


def by_width(moved: Sequence[float], widths: Sequence[int], units: int) -> Tensor:
    """Return what each of `units` directions is worth (U,) where cutting to `widths`, descending, costs `moved`.

    The lower convex hull of the costs, so that none is worth less than the one behind it; below the last width as much as above it.
    """
    if not widths:  # no multiple is below: nothing can go
        return torch.zeros(units)
    edges = torch.tensor([units, *widths])
    counts = edges[:-1] - edges[1:]
    steps = torch.tensor([0.0, *moved], dtype=torch.float64).diff() / counts
    each = torch.repeat_interleave(steps, counts)
    rising = non_decreasing(torch.cat([each, each[-1:].expand(units - len(each))]))
    return rising.flip(0).float()


@contextmanager
def _narrowed(bundle: Bundle, group: Group, turn: Turn, width: int, seen: Sums | None) -> Iterator[None]:
    """While it is open, only the first `width` directions of an attention's logits and values are there; `seen`: and a mean."""

    def keeping(there: Tensor, back: Tensor) -> Tensor:
        return (back[..., :width] @ there[:, :width]).float().to(bundle.device)  # (H, D, D)

    queries, values = keeping(turn.queries, turn.queries_back), keeping(turn.values, turn.values_back)
    mean = torch.zeros(1) if seen is None or not seen.weight else seen.mean().float()
    mean = mean.to(bundle.device)

    def project(states: Tensor, by: Tensor) -> Tensor:
        heads = states.float().unflatten(-1, (group.width, group.units))
        return torch.einsum("...hd,hed->...he", heads, by).flatten(-2).to(states.dtype)

    def make(module: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
        return project(made, queries)

    def look(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (project(args[0] - mean.to(args[0].dtype), values) + mean.to(args[0].dtype), *args[1:])

    handles = [
        bundle.module(group.writers[0]).register_forward_hook(make),
        bundle.module(group.reader).register_forward_pre_hook(look),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
