"""The score "relevance" of `prune`: how much heads had to do with what the model said, from attention maps and their gradients.

See `ops.relevance` for the source. What is differentiated: of a dual encoder, the cosine of a sample's picture (or recording) and
its text; of the tower that answers, the log-likelihood of the right answer. Heads of cross-attention have maps of their own. One
sample at a time: it has no padding, and only its own maps are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle, DualEncoder, TeacherForced
from mmcompress.errors import UsageError
from mmcompress.ops.importance import head_relevance
from mmcompress.ops.losses import token_log_likelihoods
from mmcompress.passes.base import Context
from mmcompress.passes.prune_scores import by_tower, tower_batches
from mmcompress.passes.prune_units import Group
from mmcompress.progress import track
from mmcompress.surgery.attention import telling_weights
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Tower

Inputs = dict[str, Tensor]
INSTEAD = "use score=taylor, which needs no attention maps"


def require_maps(bundle: Bundle, towers: Sequence[Tower]) -> None:
    """Raise UsageError for a tower that says nothing to be differentiated, or whose attention gives no maps."""
    for tower in towers:
        answering = isinstance(bundle.family, TeacherForced) and bundle.family.answering == tower.name
        if not answering and not isinstance(bundle.family, DualEncoder):
            others = f", or --towers {bundle.family.answering}" if isinstance(bundle.family, TeacherForced) else ""
            raise UsageError(
                f"score relevance follows an answer or a similarity back, and the {tower.name} tower of {bundle.family.name} "
                "models gives neither",
                hint=f"{INSTEAD}{others}",
            )
        attentions = [each for block in tower.blocks for each in (block.attention, block.cross) if each]
        modules = [_chooser(bundle, attention.writers[0]) for attention in attentions]
        if all(hasattr(getattr(module, "config", None), "_attn_implementation") for module in modules):
            with evaluating(bundle.model), torch.enable_grad(), telling_weights(modules) as found:
                bundle.encode(tower.name, bundle.example_inputs(tower.name, 1))
            if len(found) == len(modules) and all(
                isinstance(maps, Tensor) and maps.dim() == 4 and maps.shape[1] == attention.heads and maps.requires_grad
                for maps, attention in zip(found, attentions, strict=True)
            ):
                continue
        raise UsageError(
            f"score relevance needs attention maps, and attention of the {tower.name} tower of {bundle.family.name} models "
            "computes by itself and gives none",
            hint=INSTEAD,
        )


def relevance(bundle: Bundle, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """Return the mean relevance of each head, of key-value groups that of their query heads: per group (U,).

    Raises UsageError without data, and where no sample has what is to be differentiated.
    """
    single = dataclasses.replace(context, batch_size=1)
    scores: dict[str, Tensor] = {}
    for name, mine in by_tower(groups):
        modules = [_chooser(bundle, group.writers[0]) for group in mine]
        totals: list[Tensor] = []
        count = 0
        with evaluating(bundle.model), torch.enable_grad():
            for inputs, saying in _said(bundle, name, single):
                with telling_weights(modules) as maps:
                    said = saying(bundle.encode(name, inputs))
                gradients = torch.autograd.grad(said, maps)
                found = [head_relevance(each.detach(), slope) for each, slope in zip(maps, gradients, strict=True)]
                totals = [total + new for total, new in zip(totals, found, strict=True)] if totals else found
                count += 1
        if not count:
            raise UsageError(
                f"score relevance: no sample has what the {name} tower says something of",
                hint="give pairs, or answers to questions; " + INSTEAD,
            )
        for group, total in zip(mine, totals, strict=True):
            scores[group.reader] = (total / count).unflatten(0, (group.units, -1)).mean(1)
    return [scores[group.reader] for group in groups]


def _said(bundle: Bundle, tower: str, context: Context) -> Iterator[tuple[Inputs, Callable[[Tensor], Tensor]]]:
    """Yield each sample's inputs with what makes of a tower's row what is differentiated."""
    if not isinstance(bundle.family, DualEncoder):
        for inputs in tower_batches(bundle, tower, context, "relevance"):
            expected = bundle.forced.next_tokens(bundle.model, inputs)
            if (expected >= 0).any():
                yield inputs, partial(_likelihood, expected)
        return
    data = context.require_data("prune with relevance").subset(context.num_samples, context.seed)
    other = "text" if tower != "text" else bundle.family.media
    for index in track(range(len(data)), context.progress, f"{tower} relevance"):
        mine, theirs = (bundle.items(name, data[index])[:1] for name in (tower, other))
        if mine and theirs:
            with torch.no_grad():
                row = bundle.encode(other, bundle.prepare(other, theirs)).float()
            yield bundle.prepare(tower, mine), partial(_similarity, row)


def _similarity(other: Tensor, row: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(row.float(), other).sum()


def _likelihood(expected: Tensor, rows: Tensor) -> Tensor:
    places = expected >= 0
    roots = rows.unflatten(1, (expected.shape[1], -1))[places]
    return token_log_likelihoods(roots.float(), expected[places]).sum()


def _chooser(bundle: Bundle, query: str) -> nn.Module:
    """Return the module that makes queries with the Linear `query`, and asks its config how to attend."""
    return bundle.module(query.rpartition(".")[0])
