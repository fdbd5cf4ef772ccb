"""What a dual encoder learns in a step: losses over all pairs of a batch, held against a teacher's embeddings.

A loss over all pairs of a batch does not fall apart into losses of its pieces. So gradients go in two halves (GradCache, Gao et al.
2021, section 3): embeddings of all pieces and all processes first, the loss and its gradient at those embeddings next, and that
gradient through one piece after the other last. Two pieces of b, or two processes with b, then give what 2b gives at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.ops import losses
from mmcompress.passes.distill_data import Feeder, Micro, Rows
from mmcompress.passes.distill_objective import Embeddings, Objective
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_targets import Targets, item_of, of_tower
from mmcompress.passes.distill_train import Student


@dataclass
class PairLesson:
    """Images and texts, paired or not."""

    bundle: Bundle
    feeder: Feeder
    objective: Objective
    targets: Targets
    ranks: Ranks
    half: bool = False
    """Compute the towers in bfloat16; weights and losses stay in float32."""
    _student: nn.Module = field(init=False)

    @property
    def samples(self) -> int:
        """Samples of one step, over all processes."""
        return self.feeder.samples

    def begin(self) -> None:
        """Wrap the student for data parallelism."""
        self._student = self.ranks.wrap(Student(self.bundle, self.half))

    def batch(self, step: int) -> tuple[Rows, list[Micro]]:
        """Return the rows of a step over all processes, and this process's share of them, prepared."""
        return self.feeder.batch(step)

    def batches(self, first: int, last: int) -> Iterator[tuple[Rows, list[Micro]]]:
        """Yield the batches of steps `first` to `last`, without the last."""
        return self.feeder.batches(first, last)

    @torch.no_grad()
    def examine(self) -> dict[str, float]:
        """Return the loss on the held-back samples, and for each trained tower the mean cosine to the teacher there."""
        corpus, size = self.feeder.corpus, self.feeder.batch_size
        rows = corpus.held
        student = self.targets.student(rows)
        for name in self.feeder.towers:
            numbers, item = of_tower(rows, name), item_of(corpus, name)
            parts = [
                self.bundle.encode(name, self.bundle.prepare(name, [item(int(row)) for row in numbers[at : at + size]]))
                for at in range(0, len(numbers), size)
            ]
            student[name] = torch.cat(parts).float()
        teacher = self.targets.kept(rows, plain=True)
        found = {"loss": float(self.objective(student, teacher, same_rows(rows, self.bundle.device, corpus.paired)))}
        for name in self.feeder.towers:
            if student[name].shape == teacher[name].shape:
                found[name] = float(nn.functional.cosine_similarity(student[name], teacher[name]).mean())
        return found

    def gradients(self, batch: tuple[Rows, list[Micro]], step: int) -> float:
        """Add the gradient of the loss over all processes' samples to the parameters; return the loss."""
        rows, micros = batch
        whole = len(micros) == 1
        teacher: dict[str, list[Tensor]] = {}
        made: list[Embeddings] = []
        device = self.bundle.device
        devices = [device.index or 0] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.set_grad_enabled(whole):
            # Whatever draws random numbers in a forward draws the same in both halves, and after a resume.
            torch.manual_seed(self.feeder.seed + step)
            run = self._student if whole else getattr(self._student, "module", self._student)
            for micro in micros:
                made.append(run(micro.inputs))
                if micro.live is not None and self.targets.live is not None:
                    teacher.setdefault("vision", []).append(self._live(self.targets.live, micro.live))
            joined = {name: torch.cat([part[name] for part in made]) for name in made[0]}
            leaves = {name: value.detach().requires_grad_() for name, value in joined.items()}
            with torch.enable_grad():
                loss = self._loss(rows, leaves, {name: torch.cat(parts) for name, parts in teacher.items()})
                at = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            # Data parallelism averages what must be summed here: each process holds the gradient of its own rows only.
            slopes = {name: value * self.ranks.world for name, value in zip(leaves, at, strict=True)}
            if whole:
                _backward(joined, slopes)
                return float(loss.detach())
            torch.manual_seed(self.feeder.seed + step)
            size = self.feeder.batch_size
            for number, micro in enumerate(micros):
                part = {name: value[number * size : (number + 1) * size] for name, value in slopes.items()}
                with torch.enable_grad(), self.ranks.alone(self._student, last=number == len(micros) - 1):
                    _backward(self._student(micro.inputs), part)
        return float(loss.detach())

    def _loss(self, rows: Rows, own: Embeddings, live: Embeddings) -> Tensor:
        """Return the loss over all processes' rows, with gradient at this process's embeddings `own` only."""
        student = {name: self.ranks.gather(value) for name, value in own.items()} | self.targets.student(rows)
        teacher = self.targets.kept(rows) | {name: self.ranks.gather(value) for name, value in live.items()}
        return self.objective(student, teacher, same_rows(rows, self.bundle.device, self.objective.paired))

    def _live(self, teacher: Bundle, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), torch.autocast(self.bundle.device.type, torch.bfloat16, enabled=self.half):
            return teacher.encode("vision", inputs).float()


def same_rows(rows: Rows, device: torch.device, paired: bool) -> Tensor | None:
    """Return which pairs of a paired batch are no negatives of each other: one caption or one sample behind both."""
    if not paired:
        return None
    return losses.duplicates(*(torch.from_numpy(ids).to(device) for ids in (rows.texts, rows.images)))


def _backward(embeddings: Embeddings, slopes: Embeddings) -> None:
    torch.autograd.backward([embeddings[name] for name in slopes], list(slopes.values()))
