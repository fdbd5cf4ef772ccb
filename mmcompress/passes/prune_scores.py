"""Scores for `prune`: how much each unit matters, from weights, activations or gradients on calibration data.

Everything is streamed: forward statistics keep one number per channel. Taylor scores need no weight gradients: parameters are
frozen and the gradient is taken with respect to the activations each reader sees, one small slice of a batch at a time, so memory
is that of a few samples' activations (`_slice_size` keeps it near an eighth of the model's size). All scores are those of the uncut
model: how units stand in for one another, and what is left to do once others are gone, they do not know.

Two objectives for Taylor:

- *embedding*: a random direction r of each sample's normalised embedding u. E (r . du)^2 = |du|^2, so the mean square of the gate
  gradient is the squared displacement of the embedding when the unit goes, to first order (a Gauss-Newton step). Needs no
  labels and no pairs, and both towers speak the same unit, so one budget over both is meaningful. A decoder's rows are the roots
  of the next tokens' probabilities: |du|^2 is then a quarter of the Fisher information, averaged over the tokens.
- *contrastive*: the symmetric InfoNCE loss of a batch of pairs. The gradient with respect to all embeddings is taken first,
  without any graph of the towers; then each tower is walked in slices.

Both average the square of the gate gradient over samples (Molchanov et al. 2019) rather than its absolute value (Michel et al.
2019): squares of independent effects add up, absolute values do not, so only with squares can the damage per parameter of a head
be compared with that of the hundred neurons it costs as much as. (Measured: absolute values removed nearly all heads.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import importance
from mmcompress.passes.base import Context
from mmcompress.passes.prune_units import Group, count_tokens
from mmcompress.progress import track
from mmcompress.surgery.watch import Sums, evaluating, padding_mask, watch_blocks, watch_gradients, watch_inputs

if TYPE_CHECKING:
    from mmcompress.data import Sample

Objective = Callable[[Tensor, int], Tensor]
"""(embeddings (b, C) of a slice, its offset in the batch) -> scalar to differentiate."""


def magnitude(bundle: Bundle, groups: Sequence[Group]) -> list[Tensor]:
    """Return the L2 norm of each unit's rows, biases and columns, per group (U,)."""
    scores = []
    for group in groups:
        writers = [bundle.layer(path) for path in group.writers]
        joined = [part for writer in writers for part in (writer.weight, writer.bias) if isinstance(part, Tensor)]
        rows = [part for both in joined for part in both.chunk(group.sections)]
        reader = bundle.layer(group.reader).weight
        assert isinstance(reader, Tensor), f"{group.reader} has no weight"
        scores.append(importance.group_magnitude([r.detach() for r in rows], [reader.detach()], group.units))
    return scores


def uniform_random(groups: Sequence[Group], seed: int) -> list[Tensor]:
    """Return independent uniform scores, the same for the same seed: the control every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(group.units, generator=generator) for group in groups]


def activation(bundle: Bundle, groups: Sequence[Group], context: Context, centred: bool) -> list[Tensor]:
    """Return the Wanda norm of each unit over calibration tokens; around the mean with `centred` (FLAP)."""
    sums = {group.reader: Sums(full=False) for group in groups}
    _stream(bundle, sums, context, "activations")
    scores = []
    for group in groups:
        weight = bundle.module(group.reader).weight
        assert isinstance(weight, Tensor), f"{group.reader} has no weight"
        norms = sums[group.reader].norms(centred)
        scores.append(importance.group_activation(weight.detach(), norms, group.units))
    return scores


def _stream(bundle: Bundle, sums: dict[str, Sums], context: Context, label: str) -> None:
    """Add the calibration tokens that each Linear reads to its sums. Raises UsageError without data."""
    for tower in bundle.towers():
        mine = {path: bundle.module(path) for path in sums if tower.owns(path)}
        if not mine:
            continue
        with (
            evaluating(bundle.model),
            torch.inference_mode(),
            watch_inputs(mine, lambda path, tokens: sums[path].add(tokens)) as watch,
        ):
            for inputs in tower_batches(bundle, tower.name, context, label):
                watch.mask = padding_mask(inputs)
                bundle.encode(tower.name, inputs)


def block_influence(bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """Return 1 - E cos(before, after) of each block over calibration tokens."""
    totals = {group.reader: [0.0, 0] for group in groups}

    def record(path: str, before: Tensor, after: Tensor) -> None:
        totals[path][0] += float(importance.block_influence(before, after)) * len(before)
        totals[path][1] += len(before)

    for name, mine in _by_tower(groups):
        modules = {group.reader: bundle.module(group.reader) for group in mine}
        with evaluating(bundle.model), torch.inference_mode(), watch_blocks(modules, record) as watch:
            for inputs in tower_batches(bundle, name, context, "block influence"):
                watch.mask = padding_mask(inputs)
                bundle.encode(name, inputs)
    return [torch.tensor([totals[group.reader][0] / totals[group.reader][1]]) for group in groups]


def taylor(bundle: Bundle, groups: Sequence[Group], context: Context, objective: str) -> list[Tensor]:
    """Return the mean square of each unit's first-order effect on the objective, per group (U,)."""
    effects = Effects(groups)
    for name, mine in _by_tower(groups):
        modules: dict[str, nn.Module] = {group.reader: bundle.module(group.reader) for group in mine}
        side: Literal["inputs", "updates"] = "updates" if mine[0].kind == "blocks" else "inputs"
        step = _slice_size(bundle, name)
        add = effects.add_sample if bundle.tower(name).packed else effects.add
        with evaluating(bundle.model), watch_gradients(modules, add, side):
            walk = _contrastive if objective == "contrastive" else _directions
            for inputs, differentiate in walk(bundle, name, context, "Taylor score"):
                _backward(bundle, name, inputs, differentiate, step)
    return effects.means()


def stream_by_effect(
    bundle: Bundle,
    sums: Mapping[str, Sums],
    context: Context,
    label: str,
    outputs: Mapping[str, Sums] | None = None,
    of: str = "prune",
) -> dict[str, int]:
    """Add the calibration tokens that each Linear reads to its sums, weighted by how much its output there moves the embedding.

    The weight is the squared gradient of a random direction of the normalised embedding with respect to the Linear's output at
    the token. What a class-token readout never looks at, and padding, weighs nothing. To `outputs` the gradients themselves are
    added. Returns how many samples each tower was given. `of` names the pass in errors.
    """

    def record(path: str, states: Tensor, gradient: Tensor) -> None:
        weights = gradient.float().square().sum(-1).flatten()
        sums[path].add(states.reshape(-1, states.shape[-1]), weights)
        if outputs is not None:
            outputs[path].add(gradient.reshape(-1, gradient.shape[-1]))

    counts = {}
    for tower in bundle.towers():
        mine = {path: bundle.module(path) for path in sums if tower.owns(path)}
        if mine:
            counts[tower.name] = 0
            step = _slice_size(bundle, tower.name)
            with evaluating(bundle.model), watch_gradients(mine, record, "outputs"):
                for inputs, differentiate in _directions(bundle, tower.name, context, label, of):
                    _backward(bundle, tower.name, inputs, differentiate, step)
                    counts[tower.name] += len(next(iter(inputs.values())))
    return counts


class Effects:
    """Running means of squared gate gradients per unit, over samples."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = {group.reader: group for group in groups}
        self.totals: dict[str, Tensor] = {}
        self.counts = dict.fromkeys(self.groups, 0)

    def add(self, path: str, states: Tensor, gradient: Tensor) -> None:
        """Add the samples of one slice: states and gradient (b, N, C)."""
        effect = importance.gate_gradients(states, gradient, self.groups[path].units)
        size = effect.square().sum(0)
        self.totals[path] = self.totals[path] + size if path in self.totals else size
        self.counts[path] += len(effect)

    def add_sample(self, path: str, states: Tensor, gradient: Tensor) -> None:
        """Add the only sample of a slice, from a packed tower: states and gradient (N, C), or (windows, N, C)."""
        self.add(path, states.reshape(1, -1, states.shape[-1]), gradient.reshape(1, -1, gradient.shape[-1]))

    def means(self) -> list[Tensor]:
        """Return the mean per unit (U,), in the order of the groups; 0 where nothing that the tower gives out depends on it."""
        return [
            self.totals[path] / self.counts[path] if path in self.totals else torch.zeros(group.units)
            for path, group in self.groups.items()
        ]


def _directions(
    bundle: Bundle, tower: str, context: Context, label: str, of: str = "prune"
) -> Iterator[tuple[dict[str, Tensor], Objective]]:
    """Yield each batch with a random direction of every sample's normalised embedding."""
    generator = torch.Generator().manual_seed(context.seed)
    for inputs in tower_batches(bundle, tower, context, label, of):
        seed = int(torch.randint(2**31, (), generator=generator))

        def differentiate(embeddings: Tensor, start: int, seed: int = seed) -> Tensor:
            # Drawn per sample, so that the slice size does not change the result.
            signs = torch.stack([_signs(embeddings.shape[1], seed + start + row) for row in range(len(embeddings))])
            return (nn.functional.normalize(embeddings.float(), dim=-1) * signs.to(embeddings.device)).sum()

        yield inputs, differentiate


def _signs(width: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def _contrastive(
    bundle: Bundle, tower: str, context: Context, label: str
) -> Iterator[tuple[dict[str, Tensor], Objective]]:
    """Yield each batch of pairs with the gradient of its InfoNCE loss with respect to this tower's embeddings."""
    if context.batch_size < 2:
        raise UsageError(
            f"the contrastive Taylor score tells the samples of a batch apart, and batch_size is {context.batch_size}",
            hint="use a batch_size of 2 or more (16 is usual), or objective=embedding",
        )
    data = context.require_data(f"prune with {label}").subset(context.num_samples, context.seed)
    media = bundle.dual.media
    paired = [index for index in range(len(data)) if _has(data[index], media) and data[index].texts]
    if len(paired) < 2:
        raise UsageError(
            f"the contrastive Taylor score needs at least 2 samples with {_HELD[media]} and a text",
            hint="use objective=embedding, which needs no pairs",
        )
    scale = bundle.dual.similarity(bundle.model)[0].detach().float()
    starts = range(0, len(paired), context.batch_size)
    for start in track(starts, context.progress, f"{tower} {label}", len(starts)):
        samples = [data[index] for index in paired[start : start + context.batch_size]]
        inputs = {
            media: bundle.prepare(media, [item for sample in samples for item in bundle.items(media, sample)]),
            "text": bundle.prepare("text", [sample.texts[0] for sample in samples]),
        }
        with torch.no_grad():
            leaves = {name: bundle.encode(name, part).float() for name, part in inputs.items()}
        with torch.enable_grad():
            for leaf in leaves.values():
                leaf.requires_grad_()
            shown, text = (nn.functional.normalize(leaves[name], dim=-1) for name in (media, "text"))
            logits = scale * shown @ text.T
            target = torch.arange(len(samples), device=logits.device)
            loss = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
            (wanted,) = torch.autograd.grad(loss / 2, [leaves[tower]])

        def differentiate(embeddings: Tensor, start: int, wanted: Tensor = wanted) -> Tensor:
            return (embeddings.float() * wanted[start : start + len(embeddings)]).sum()

        yield inputs[tower], differentiate


_HELD = {"vision": "an image", "audio": "a recording"}


def _has(sample: Sample, media: str) -> bool:
    return (sample.audio if media == "audio" else sample.picture) is not None


def _backward(bundle: Bundle, tower: str, inputs: dict[str, Tensor], objective: Objective, step: int) -> None:
    size = len(next(iter(inputs.values())))
    for start in range(0, size, step):
        part = {name: value[start : start + step] for name, value in inputs.items()}
        with torch.enable_grad():
            found = objective(bundle.encode(tower, part), start)
            if (
                found.requires_grad
            ):  # else nothing that is watched reaches the output: blocks behind the one that is read
                found.backward()


def _slice_size(bundle: Bundle, name: str) -> int:
    """Return how many samples may keep their graph at once: about an eighth of the model's bytes (or 32 MiB), at least one."""
    tower = bundle.tower(name)
    if tower.packed:
        return 1  # whose tokens are whose is known of single samples only
    allowed = max(2**25, sum(p.numel() * p.element_size() for p in bundle.model.parameters()) // 8)
    seen = count_tokens(bundle, tower)
    tokens = tower.stream.tokens if tower.stream else max(64, *(seen[block.attention.reader] for block in tower.blocks))
    # Saved per token and block: the MLP's hidden states before and after the activation; norms, q, k, v, attention: about 8 C.
    numbers = tokens * sum(8 * b.attention.heads * b.attention.head_dim + 3 * b.mlp.neurons for b in tower.blocks)
    crosses = [block.cross for block in tower.blocks if block.cross]
    numbers += sum(2 * seen[cross.writers[-1]] * cross.kv_heads * cross.head_dim for cross in crosses)
    if tower.tied:
        # What follows each token: logits, probabilities, their roots, the row, its direction and its gradient.
        tables: list[Any] = [bundle.module(table) for table, _ in tower.tied]
        numbers += 6 * tokens * sum(table.num_embeddings for table in tables)
    return max(1, min(64, allowed // (numbers * 4)))


def tower_batches(
    bundle: Bundle, tower: str, context: Context, label: str, of: str = "prune"
) -> Iterator[dict[str, Tensor]]:
    """Yield the tower's calibration inputs: images, or all texts of the chosen samples, at most `batch_size` at a time.

    Raises UsageError when the data has nothing for this tower.
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


def _by_tower(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    return [(name, list(mine)) for name, mine in groupby(groups, key=lambda group: group.tower)]
