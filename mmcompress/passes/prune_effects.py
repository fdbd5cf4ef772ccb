"""Scores for `prune` from gradients: what removing a unit does to an objective, to first order; and how much each token matters.

No weight needs a gradient: parameters are frozen and the gradient is taken with respect to the activations each reader sees, one
small slice of a batch at a time, so memory is that of a few samples' activations (`slice_size` keeps it near an eighth of the
model's size).

Objectives:

- *embedding*: a random direction r of each sample's normalised embedding u. E (r . du)^2 = |du|^2, so the mean square of the gate
  gradient is the squared displacement of the embedding when the unit goes, to first order (a Gauss-Newton step). Needs no
  labels and no pairs, and both towers speak the same unit, so one budget over both is meaningful. A decoder's rows are the roots
  of the next tokens' probabilities: |du|^2 is then a quarter of the Fisher information, averaged over the tokens.
- *contrastive*: the symmetric InfoNCE loss of a batch of pairs. The gradient with respect to all embeddings is taken first,
  without any graph of the towers; then each tower is walked in slices.
- *answers*: the negative log-likelihood of a sample's right answer, averaged over its tokens.

Three summaries of the gate gradients g of the samples, from one look at them: E g^2 ("taylor"), |E g| ("taylor-signed", of which a
random direction says nothing) and E |g| ("taylor-absolute"). Squares of independent effects add up, absolute values do not, so
only with squares can the damage per parameter of a head be compared with that of the hundred neurons it costs as much as.
(Measured: absolute values removed nearly all heads.) The other two are compared within their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import importance
from mmcompress.ops.losses import token_log_likelihoods
from mmcompress.passes.base import Context
from mmcompress.passes.prune_scores import by_tower, tower_batches
from mmcompress.passes.prune_units import Group, count_tokens
from mmcompress.progress import track
from mmcompress.surgery.watch import Sums, evaluating, watch_gradients
from mmcompress.views import Block

if TYPE_CHECKING:
    from mmcompress.data import Sample

Objective = Callable[[Tensor, int], Tensor]
"""(embeddings (b, C) of a slice, its offset in the batch) -> scalar to differentiate."""
SUMMARIES = ("taylor", "taylor-signed", "taylor-absolute")
"""The scores made of gate gradients, in the order in which `Effects` keeps their sums."""


def taylor(
    bundle: Bundle, groups: Sequence[Group], context: Context, objective: str, score: str = "taylor"
) -> list[Tensor]:
    """Return one summary of each unit's first-order effects on the objective, per group (U,)."""
    return effects(bundle, groups, context, objective).summary(score)


def effects(bundle: Bundle, groups: Sequence[Group], context: Context, objective: str) -> Effects:
    """Return the first-order effects of every unit on the objective, summed up over the samples."""
    found = Effects(groups)
    for name, mine in by_tower(groups):
        modules: dict[str, nn.Module] = {group.reader: bundle.module(group.reader) for group in mine}
        side: Literal["inputs", "updates"] = "updates" if mine[0].kind == "blocks" else "inputs"
        add = found.add_sample if bundle.tower(name).packed else found.add
        with evaluating(bundle.model), watch_gradients(modules, add, side):
            walk_backward(bundle, name, context, objective)
    return found


def walk_backward(bundle: Bundle, tower: str, context: Context, objective: str) -> None:
    """Differentiate the objective of every calibration sample of a tower: whoever watches sees them go by."""
    walk = {"contrastive": _contrastive, "answers": answers}.get(objective, _directions)
    step = slice_size(bundle, tower)
    for inputs, differentiate in walk(bundle, tower, context, "Taylor score"):
        backward(bundle, tower, inputs, differentiate, step)


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
    added. Return how many samples each tower was shown. `of` names the pass in errors.
    """

    def record(path: str, states: Tensor, gradient: Tensor) -> None:
        weights = gradient.float().square().sum(-1).flatten()
        sums[path].add(states.reshape(-1, states.shape[-1]), weights)
        if outputs is not None:
            outputs[path].add(gradient.reshape(-1, gradient.shape[-1]))

    samples: dict[str, int] = {}
    for tower in bundle.towers():
        mine = {path: bundle.module(path) for path in sums if tower.owns(path)}
        if mine:
            samples[tower.name] = 0
            step = slice_size(bundle, tower.name)
            with evaluating(bundle.model), watch_gradients(mine, record, "outputs"):
                for inputs, differentiate in _directions(bundle, tower.name, context, label, of):
                    samples[tower.name] += len(next(iter(inputs.values())))
                    backward(bundle, tower.name, inputs, differentiate, step)
    return samples


class Effects:
    """Running sums of gate gradients per unit, over samples: of their squares, of themselves, of their absolute values."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = {group.reader: group for group in groups}
        self.totals: dict[str, Tensor] = {}
        """Of each reader, (3, U)."""
        self.counts = dict.fromkeys(self.groups, 0)

    def add(self, path: str, states: Tensor, gradient: Tensor) -> None:
        """Add the samples of one slice: states and gradient (b, N, C)."""
        effect = importance.gate_gradients(states, gradient, self.groups[path].units)
        sums = torch.stack([effect.square().sum(0), effect.sum(0), effect.abs().sum(0)])
        self.totals[path] = self.totals[path] + sums if path in self.totals else sums
        self.counts[path] += len(effect)

    def add_sample(self, path: str, states: Tensor, gradient: Tensor) -> None:
        """Add the only sample of a slice, from a packed tower: states and gradient (N, C), or (windows, N, C)."""
        self.add(path, states.reshape(1, -1, states.shape[-1]), gradient.reshape(1, -1, gradient.shape[-1]))

    def summary(self, score: str) -> list[Tensor]:
        """Return one number per unit (U,), in the order of the groups; 0 where nothing that the tower gives out depends on it."""
        row = SUMMARIES.index(score)
        return [
            (self.totals[path][row] / self.counts[path]).abs() if path in self.totals else torch.zeros(group.units)
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


def answers(bundle: Bundle, tower: str, context: Context, label: str) -> Iterator[tuple[dict[str, Tensor], Objective]]:
    """Yield each batch with the negative log-likelihood of every sample's answer. Raises UsageError where none has one."""
    found = False
    for inputs in tower_batches(bundle, tower, context, label):
        expected = bundle.forced.next_tokens(bundle.model, inputs)
        found = found or bool((expected >= 0).any())

        def differentiate(rows: Tensor, start: int, expected: Tensor = expected) -> Tensor:
            wanted = expected[start : start + len(rows)]
            places = wanted >= 0
            shares = places / places.sum(1, keepdim=True).clamp_min(1)  # (b, T): each sample counts once
            roots = rows.unflatten(1, (wanted.shape[1], -1))[places]
            return -(token_log_likelihoods(roots.float(), wanted[places]) * shares[places]).sum()

        yield inputs, differentiate
    if not found:
        raise UsageError(
            f"prune with {label}: no sample has an answer for the {tower} tower",
            hint="give data with answers, or use score=taylor with objective=embedding, which needs none",
        )


_HELD = {"vision": "an image", "audio": "a recording"}


def _has(sample: Sample, media: str) -> bool:
    return (sample.audio if media == "audio" else sample.picture) is not None


def backward(bundle: Bundle, tower: str, inputs: dict[str, Tensor], objective: Objective, step: int) -> None:
    """Differentiate the objective of a batch, `step` samples at a time: whoever watches sees them go by."""
    size = len(next(iter(inputs.values())))
    for start in range(0, size, step):
        part = {name: value[start : start + step] for name, value in inputs.items()}
        with torch.enable_grad():
            found = objective(bundle.encode(tower, part), start)
            # Else nothing that is watched reaches the output: blocks behind the one that is read.
            if found.requires_grad:
                found.backward()


def _neurons(block: Block) -> int:
    """Return how many neurons a token goes through."""
    return block.feeding.neurons * (block.experts.top if block.experts else 1)


def slice_size(bundle: Bundle, name: str) -> int:
    """Return how many samples may keep their graph at once: about an eighth of the model's bytes (or 32 MiB), at least one."""
    tower = bundle.tower(name)
    if tower.packed:
        return 1  # whose tokens are whose is known of single samples only
    allowed = max(2**25, sum(p.numel() * p.element_size() for p in bundle.model.parameters()) // 8)
    seen = count_tokens(bundle, tower)
    tokens = tower.stream.tokens if tower.stream else max(64, *(seen[block.attention.reader] for block in tower.blocks))
    # Saved per token and block: the MLP's hidden states before and after the activation; norms, q, k, v, attention: about 8 C.
    numbers = tokens * sum(8 * b.attention.heads * b.attention.head_dim + 3 * _neurons(b) for b in tower.blocks)
    crosses = [block.cross for block in tower.blocks if block.cross]
    numbers += sum(2 * seen[cross.writers[-1]] * cross.kv_heads * cross.head_dim for cross in crosses)
    if tower.tied:
        # What follows each token: logits, probabilities, their roots, the row, its direction and its gradient.
        tables: list[Any] = [bundle.module(table) for table, _ in tower.tied]
        numbers += 6 * tokens * sum(table.num_embeddings for table in tables)
    return max(1, min(64, allowed // (numbers * 4)))
