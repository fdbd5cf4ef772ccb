"""Scores for `prune` from weights and activations: how much each unit matters. Those from gradients: `prune_effects` and others.

Forward statistics are streamed and keep one number per channel. All scores are those of the uncut model: what is left to do
once others are gone they do not know (but see `prune_surgeon`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import importance
from mmcompress.ops.balance import token_weights
from mmcompress.passes.base import Context
from mmcompress.passes.prune_units import Group
from mmcompress.passes.quantize_balance import image_places
from mmcompress.progress import track
from mmcompress.surgery.watch import Sums, evaluating, padding_mask, watch_blocks, watch_inputs


def magnitude(bundle: Bundle, groups: Sequence[Group]) -> list[Tensor]:
    """Return the L2 norm of each unit's rows, biases and columns, per group (U,).

    Of an expert, that of all its weights and of its row of the router.
    """
    scores = []
    for group in groups:
        if group.kind == "head-dims":
            scores.append(_magnitude_of_dims(bundle, group))
            continue
        if group.kind == "experts":
            owners = [name.rpartition(".")[::2] for name in (*group.writers, f"{group.reader}.weight")]
            own = [bundle.layer(path).get_parameter(name).detach().flatten(1) for path, name in owners]
            scores.append(torch.cat(own, dim=1).double().norm(dim=1).float())
            continue
        writers = [bundle.layer(path) for path in group.writers]
        joined = [part for writer in writers for part in (writer.weight, writer.bias) if isinstance(part, Tensor)]
        rows = [part for both in joined for part in both.chunk(group.sections)]
        reader = bundle.layer(group.reader).weight
        assert isinstance(reader, Tensor), f"{group.reader} has no weight"
        scores.append(importance.group_magnitude([r.detach() for r in rows], [reader.detach()], group.units))
    return scores


def _magnitude_of_dims(bundle: Bundle, group: Group) -> Tensor:
    """Return the L2 norm of each channel's rows, biases and columns in all heads (U,)."""
    writers = [bundle.layer(path) for path in group.writers]
    parts = [part for writer in writers for part in (writer.weight, writer.bias) if isinstance(part, Tensor)]
    reader = bundle.layer(group.reader).weight
    assert isinstance(reader, Tensor), f"{group.reader} has no weight"
    return importance.group_magnitude(
        [_by_channel(part.detach(), group) for part in parts], [_by_channel(reader.detach().T, group).T], group.units
    )


def _by_channel(rows: Tensor, group: Group) -> Tensor:
    """Return rows (H * D, …), those of one channel in all heads side by side: (D * H, …)."""
    return rows.unflatten(0, (-1, group.units)).transpose(0, 1).flatten(0, 1)


def uniform_random(groups: Sequence[Group], seed: int) -> list[Tensor]:
    """Return independent uniform scores, the same for the same seed: the control every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(group.units, generator=generator) for group in groups]


def activation(
    bundle: Bundle, groups: Sequence[Group], context: Context, centred: bool, balance: bool = False
) -> list[Tensor]:
    """Return the Wanda norm of each unit over calibration tokens; around the mean with `centred` (FLAP).

    With `balance`, image tokens and text tokens of a language model count as much together, however many there are of each.
    """
    sums = {group.reader: Sums(full=False) for group in groups}
    texts = {path: Sums(full=False) for path in sums} if balance else {}
    stream_inputs(bundle, sums, context, "activations", texts)
    scores = []
    for group in groups:
        weight = bundle.module(group.reader).weight
        assert isinstance(weight, Tensor), f"{group.reader} has no weight"
        seen = sums[group.reader]
        if balance:
            seen = _balanced(seen, texts[group.reader])
        scores.append(importance.group_activation(weight.detach(), seen.norms(centred), group.units))
    return scores


def _balanced(images: Sums, texts: Sums) -> Sums:
    """Return sums over both in which each kind counts half; of a tower that sees one kind only, those of that one."""
    if not images.weight or not texts.weight:
        return images if images.weight else texts
    assert images.first is not None, "some tokens were added"
    assert images.second is not None, "some tokens were added"
    assert texts.first is not None, "some tokens were added"
    assert texts.second is not None, "some tokens were added"
    per_image, per_text = token_weights(1.0, round(images.weight), round(texts.weight))
    mixed = Sums(full=False)
    mixed.weight = per_image * images.weight + per_text * texts.weight
    mixed.first = per_image * images.first + per_text * texts.first
    mixed.second = per_image * images.second + per_text * texts.second
    return mixed


def stream_inputs(
    bundle: Bundle, sums: Mapping[str, Sums], context: Context, label: str, texts: Mapping[str, Sums] | None = None
) -> None:
    """Add the calibration tokens that each Linear reads to its `sums`; to `texts`, where given, those that are no image's.

    Raises UsageError without data, and where tokens of a prompt are not told apart any more.
    """
    image: Tensor | None = None

    def add(path: str, tokens: Tensor) -> None:
        if image is None:
            sums[path].add(tokens)
            return
        if len(tokens) != len(image):
            raise UsageError(
                f"prune.balance cannot tell image tokens from text: {path} is given {len(tokens)} tokens, the prompts have "
                f"{len(image)}",
                hint="prune before tokens are dropped on their way, or leave balance out",
            )
        for chosen, own in ((image, sums), (~image, texts or {})):
            if chosen.any():
                own[path].add(tokens[chosen])

    for tower in bundle.towers():
        mine = {path: bundle.module(path) for path in sums if tower.owns(path)}
        if not mine:
            continue
        image = None
        with evaluating(bundle.model), torch.inference_mode(), watch_inputs(mine, add) as watch:
            for inputs in tower_batches(bundle, tower.name, context, label):
                watch.mask = padding_mask(inputs)
                if texts and tower.prompt is not None:
                    image = image_places(inputs, tower.prompt.image_tokens)
                bundle.encode(tower.name, inputs)


def block_influence(bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """Return 1 - E cos(before, after) of each block over calibration tokens."""
    totals = {group.reader: [0.0, 0] for group in groups}

    def record(path: str, before: Tensor, after: Tensor) -> None:
        totals[path][0] += float(importance.block_influence(before, after)) * len(before)
        totals[path][1] += len(before)

    for name, mine in by_tower(groups):
        modules = {group.reader: bundle.module(group.reader) for group in mine}
        with evaluating(bundle.model), torch.inference_mode(), watch_blocks(modules, record) as watch:
            for inputs in tower_batches(bundle, name, context, "block influence"):
                watch.mask = padding_mask(inputs)
                bundle.encode(name, inputs)
    return [torch.tensor([totals[group.reader][0] / totals[group.reader][1]]) for group in groups]


def tower_batches(
    bundle: Bundle, tower: str, context: Context, label: str, of: str = "prune"
) -> Iterator[dict[str, Tensor]]:
    """Yield the tower's calibration inputs: images, or all texts of the chosen samples, at most `batch_size` at a time.

    `of` names the pass in errors. Raises UsageError when the data has nothing for this tower.
    """
    data = context.require_data(f"{of} with {label}").subset(context.num_samples, context.seed)
    found = False
    for start in track(range(0, len(data), context.batch_size), context.progress, f"{tower} {label}"):
        samples = [data[index] for index in range(start, min(start + context.batch_size, len(data)))]
        items: list[object] = []
        for sample in samples:
            items.extend(bundle.items(tower, sample))
        for first in range(0, len(items), context.batch_size):
            found = True
            yield bundle.prepare(tower, items[first : first + context.batch_size])
    if not found:
        raise UsageError(
            f"the data '{data.name}' has nothing for the {tower} tower",
            hint="use data that has, or choose other towers with --towers",
        )


def by_tower(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Return the groups of each tower, in their order."""
    return [(name, list(mine)) for name, mine in groupby(groups, key=lambda group: group.tower)]
