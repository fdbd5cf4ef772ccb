"""What a student is pulled towards: the weighted losses of one batch of embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.ops import losses

Embeddings = dict[str, Tensor]
"""Per tower (B, C), not normalised."""
LARGEST_SCALE = 100.0
"""CLIP's own bound on the scale of its logits; SigLIP's exceeds it, and a softmax that sharp has no gradient left."""


@dataclass(frozen=True)
class Objective:
    """Weights of the losses in `ops.losses`, and the two models' (scale, bias) of logits. All are fixed while training."""

    feature: float
    interactive: float
    relational: float
    logit: float
    affinity: float
    temperature: float
    paired: bool
    student: tuple[float, float]
    teacher: tuple[float, float]

    @property
    def active(self) -> bool:
        """Whether any loss has a weight on such data."""
        return any((self.feature, self.interactive, self.relational, self.logit, self.affinity))

    @property
    def compares_spaces(self) -> bool:
        """Whether student and teacher vectors meet in one product, and so must have the same width."""
        return self.feature > 0 or self.interactive > 0 or self.affinity > 0

    @property
    def needs_both_towers(self) -> bool:
        """Whether the teacher's vectors of a modality matter where only the other one trains."""
        return self.affinity > 0 or self.needs_frozen_student

    @property
    def needs_frozen_student(self) -> bool:
        """Whether the student's vectors of a frozen tower matter."""
        return self.paired and (self.interactive > 0 or self.relational > 0 or self.logit > 0)

    def __call__(self, student: Embeddings, teacher: Embeddings, same: Tensor | None) -> Tensor:
        """Return the loss of a batch.

        student: the towers there are; teacher: these or more. Rows belong together across towers if `paired`.
        same: (B, B) bool, pairs that are no negatives of each other.
        """
        scale = min(self.teacher[0], LARGEST_SCALE)
        terms = [self.feature * losses.feature(own, teacher[name]) for name, own in student.items() if self.feature]
        if self.paired and len(student) == 2:
            own, goal = (student["vision"], student["text"]), (teacher["vision"], teacher["text"])
            if self.interactive:
                terms.append(self.interactive * losses.interactive(own, goal, scale, same))
            if self.relational:
                terms.append(self.relational * losses.relational(own, goal, scale))
            if self.logit:
                logits = (self._logits(own, self.student), self._logits(goal, self.teacher))
                terms.append(self.logit * losses.matrix_kl(*logits, temperature=self.temperature))
        for name, own_rows in student.items():
            if not self.paired and self.relational:
                terms.append(self.relational * losses.structure(own_rows, teacher[name], scale))
            for other, bank in teacher.items():
                if self.affinity and other != name:
                    term = losses.affinity(own_rows, teacher[name], bank, scale, self.temperature)
                    terms.append(self.affinity * term)
        return torch.stack(terms).sum()

    def _logits(self, pair: tuple[Tensor, Tensor], similarity: tuple[float, float]) -> Tensor:
        return similarity[0] * losses.cosines(*pair) + similarity[1]
