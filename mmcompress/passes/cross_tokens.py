"""Training the cross tokens of `merge-tokens` (method crossget): every block's says by itself what a picture's text would.

Nothing else trains. The tokens flow through the blocks without gradient; a block's cross token looks at what that block is given,
and goes where the tower's output is read, as if it were all there is. What is read there and the embedding of the picture's text,
which never changes, are pulled together by `losses.mutual`.

Source: CrossGET, arXiv 2305.17455, section 3.2. Deliberate difference: there each layer's cross token of one tower meets that of
the same layer of the other, which takes two towers of one depth that both merge; here it meets what the other tower finally says.

Shapes: B batch, N tokens, C channels, E channels of the shared space, L blocks with a cross token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.errors import UsageError
from mmcompress.ops import losses
from mmcompress.passes.base import Context
from mmcompress.passes.distill_data import Feeder, Micro, Rows, read_corpus
from mmcompress.passes.distill_ranks import Ranks, world_size
from mmcompress.passes.distill_run import full_precision
from mmcompress.passes.distill_state import State
from mmcompress.passes.distill_targets import Table, digest, embed_once, item_of
from mmcompress.passes.distill_train import Schedule, Trainer
from mmcompress.passes.merge_schedule import merging_blocks
from mmcompress.surgery.cross_tokens import add_cross_token, cross_vector
from mmcompress.surgery.merging_step import told_by_guide
from mmcompress.surgery.reduction import Flow, ledger_of
from mmcompress.views import Tower

NEED = "learning cross tokens"
BATCH = 64
LEARNING_RATE = 3e-2
"""Of vectors that begin as zeros beside tokens whose channels are of size 1 and more."""
SAVE_MINUTES = 5.0


def other_tower(bundle: Bundle, tower: Tower) -> Tower:
    """Return the tower of texts beside that of pictures. Raises UsageError where there is none."""
    if isinstance(bundle.family, DualEncoder) and tower.name == bundle.family.media == "vision":
        found = [other for other in bundle.towers() if other.name == "text"]
        if found:
            return found[0]
    raise UsageError(
        f"cross tokens learn from pictures with their texts in a space that both share, and the {tower.name} tower of "
        f"{bundle.family.name} models is not in one",
        hint="leave guide out: the class token, or the mean, then says what matters",
    )


def add_vectors(bundle: Bundle, tower: Tower, merged: Sequence[int]) -> None:
    """Give each block of `tower` that merges tokens, by how many each does, its vector, untrained."""
    for block, removed in zip(merging_blocks(tower), merged, strict=True):
        if removed:
            width = int(bundle.module(block.attention.reader).out_features)  # type: ignore[arg-type]
            with bundle.device:
                add_cross_token(bundle.module(block.path), width, bundle.model.dtype)


def trained(bundle: Bundle, tower: Tower, context: Context, epochs: int) -> dict[str, Any]:
    """Train the vectors of the blocks of `tower` in place; return what they cost and what came of it.

    Raises UsageError without data, where a sample lacks its picture or its text, and when the loss stops being a number.
    """
    text = other_tower(bundle, tower)
    data = context.require_data(NEED)
    corpus = read_corpus(data, "paired", context.seed)
    blocks = {block.path: bundle.module(block.path) for block in tower.blocks}
    vectors = {
        f"{path}.cross_token": vector for path, block in blocks.items() if (vector := cross_vector(block)) is not None
    }
    # So few parameters gain nothing by several processes: each trains all of them, and comes to the same values.
    alone = Ranks()
    batch = min(BATCH, corpus.size)
    feeder = Feeder(corpus, bundle, (tower.name,), batch, 1, context.seed)
    steps = epochs * max(1, corpus.size // feeder.samples)
    folder = context.workdir / "cross-tokens" if context.workdir and world_size() == 1 else None
    with full_precision(bundle.model):
        bundle.model.eval()
        run = digest(epochs, LEARNING_RATE, context.seed, data.fingerprint(), bundle)
        used = corpus.used(steps * feeder.samples, context.seed)
        table = embed_once(
            bundle, text.name, used.texts, item_of(corpus, text.name), batch_size=batch,
            folder=folder / f"texts-{run}" if folder else None, ranks=alone, progress=context.progress, label="texts",
        )  # fmt: skip
        lesson = _Lesson(bundle, tower, feeder, table)
        before = lesson.examine()
        schedule = Schedule(
            steps=steps, learning_rate=LEARNING_RATE, weight_decay=0.0, warmup=0.05, clip=0.0, ema=0.0,
            save_minutes=SAVE_MINUTES,
        )  # fmt: skip
        state = State.open(folder, run)
        Trainer(bundle, vectors, lesson, schedule, alone, context.progress, label=NEED).run(state)
        after = lesson.examine()
    context.progress.say(
        f"cosine of what cross tokens say to the pictures' texts, held back: {before['cosine']:.3f} before, "
        f"{after['cosine']:.3f} after {steps} steps"
    )
    return {
        "parameters": sum(vector.numel() for vector in vectors.values()),
        "steps": steps,
        **{name: {"before": round(before[name], 6), "after": round(after[name], 6)} for name in before},
    }


@dataclass
class _Lesson:
    """Pictures, and what the other tower says of their texts."""

    bundle: Bundle
    tower: Tower
    feeder: Feeder
    table: Table

    @property
    def samples(self) -> int:
        """Samples of one step."""
        return self.feeder.samples

    def begin(self) -> None:
        """Do nothing: there is one process."""

    def batch(self, step: int) -> tuple[Rows, list[Micro]]:
        """Return the rows of a step, and its pictures, prepared."""
        return self.feeder.batch(step)

    def batches(self, first: int, last: int) -> Iterator[tuple[Rows, list[Micro]]]:
        """Yield the batches of steps `first` to `last`, without the last."""
        return self.feeder.batches(first, last)

    def gradients(self, batch: tuple[Rows, list[Micro]], step: int) -> float:
        """Add the gradient of the loss to the vectors; return the loss."""
        rows, (micro,) = batch
        loss = self._loss(micro.inputs[self.tower.name], rows.texts)[0]
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def examine(self) -> dict[str, float]:
        """Return "loss" and "cosine" on the held-back samples, averaged over the blocks."""
        held, item = self.feeder.corpus.held, item_of(self.feeder.corpus, self.tower.name)
        found = []
        for start in range(0, len(held.images), self.feeder.batch_size):
            part = slice(start, start + self.feeder.batch_size)
            inputs = self.bundle.prepare(self.tower.name, [item(int(row)) for row in held.images[part]])
            found.append(torch.stack(self._loss(inputs, held.texts[part])) * len(held.images[part]))
        loss, cosine = (torch.stack(found).sum(dim=0) / len(held.images)).tolist()
        return {"loss": loss, "cosine": cosine}

    def _loss(self, inputs: dict[str, Tensor], texts: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and the cosine to its texts."""
        said = self.said(inputs)  # (L * B, E)
        target = self.table.lookup(texts)
        target = target.repeat(len(said) // len(target), 1)
        return losses.mutual(said, target), nn.functional.cosine_similarity(said, target).mean()

    def said(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return what the tower would say (L * B, E) if a cross token were all it has, block by block."""
        inputs = {name: value.to(self.bundle.device) for name, value in inputs.items()}
        with _replacing_output(self.bundle, self.tower):
            return self.bundle.encode(self.tower.name, inputs).float()


@contextlib.contextmanager
def _replacing_output(bundle: Bundle, tower: Tower) -> Iterator[None]:
    """While it is open, the tower's last block gives out what all blocks make of their cross tokens, (L * B, 1, C)."""
    told: list[Tensor] = []
    blocks = [bundle.module(block.path) for block in tower.blocks]
    ledger = ledger_of(blocks[0])
    assert ledger is not None, "apply bound the blocks"

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {key: value for key, value in kwargs.items() if key not in ("hidden_states", "attention_mask")}
        tokens = args[0] if args else kwargs["hidden_states"]
        told.append(told_by_guide(block, tokens, ledger.flow or Flow(), ledger.padded, rest))

    def replace(*_: Any) -> Tensor:
        ledger.flow = None  # a pooling attention behind the blocks has these tokens to look at, all of one size
        made = torch.cat(told)
        told.clear()
        return made

    hooks = [
        block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks if cross_vector(block) is not None
    ]
    hooks.append(blocks[-1].register_forward_hook(replace))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
