"""Distillation losses: tensors in, one scalar out, equal to 0 with gradient 0 where student and teacher agree (not `contrastive`).

Every loss is a mean over its rows (`answer_kl` gives them one by one), so its size does not depend on the batch. Embeddings need
not be normalised; they are in here.

    feature      ||s - t||^2 of unit vectors = 2 (1 - cosine)                       CLIP-KD (Yang et al. 2024), section 3.2, "FD"
    contrastive  -log softmax(scale * q k^T)[i, i]                                  CLIP (Radford et al. 2021), section 2.3
    interactive  contrastive between one model's images and the other's texts       CLIP-KD, section 3.2, "ICL"
    relational   KL between the rows of both models' similarity matrices            CLIP-KD, section 3.2, "CRD"
    softened_kl  T^2 KL(softmax(z_t / T) || softmax(z_s / T))                       Hinton et al. 2015, section 2
    affinity     softened_kl over similarities to a bank of the teacher's vectors   DIME-FM (Sun et al. 2023), section 3.2
    answer_kl    KL(p_t || p_s) of next-token distributions, T = 1                  Kim and Rush 2016, section 3.1 (word-level)
    hidden       mean squared difference / variance of the teacher's states         TinyBERT (Jiao et al. 2020), section 3
    mutual       1/2 KL(m || p) + 1/2 KL(m || q), m the mean of two distributions   CrossGET (Shi et al. 2024), section 3.2

Deliberate differences: a hidden state's squared difference is relative to the teacher's variance, so that one weight fits every
model: 1 is what a constant would cost. CLIP-KD averages the squared difference over the C channels and weighs it with 2000;
summing over them makes one weight (2000 / 512, about 4) fit every width. Its ICL anchors on the student's side only; here both
sides are anchors. Captions that occur twice in a batch are no negatives of each other: `duplicates` marks them and the softmax
leaves them out.

The last two are for models that answer in text. Next-token distributions p come as roots sqrt(p), which is how families encode
them: log p = 2 log root.

Shape alphabet: B batch (rows), K keys or bank entries, C channels, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EXCLUDED = -1e4
"""Logit of an entry that a softmax leaves out; exp of it is 0, and unlike -inf it subtracts without becoming nan."""


def duplicates(*ids: Tensor) -> Tensor:
    """Return (B, B) bool: true off the diagonal where two rows share an id in any of `ids`, each (B,) int."""
    same = torch.zeros(len(ids[0]), len(ids[0]), dtype=torch.bool, device=ids[0].device)
    for column in ids:
        same |= column[:, None] == column[None, :]
    return same.fill_diagonal_(False)


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine of every row of `left` (B, C) with every row of `right` (K, C): (B, K)."""
    return functional.normalize(left, dim=-1) @ functional.normalize(right, dim=-1).T


def feature(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of the unit vectors of `student` and `teacher`, both (B, C)."""
    difference = functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)
    return difference.square().sum(-1).mean()


def contrastive(queries: Tensor, keys: Tensor, scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """Return the cross entropy of finding key i for query i among all keys; both (B, C).

    same: (B, B) bool, pairs to leave out of the softmax because they are right answers too (see `duplicates`).
    """
    logits = _without(scale * cosines(queries, keys), same)
    return functional.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


def interactive(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], scale: Tensor | float, same: Tensor | None = None
) -> Tensor:
    """Return the mean contrastive loss of student images with teacher texts and of teacher images with student texts, both ways.

    student, teacher: (images, texts), each (B, C) in one shared space; row i of all four is the same sample.
    """
    pairs = ((student[0], teacher[1]), (teacher[0], student[1]))
    terms = [contrastive(a, b, scale, same) + contrastive(b, a, scale, same) for a, b in pairs]
    return torch.stack(terms).mean() / 2


def softened_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * KL(teacher || student) of the softmax over the last dimension, mean over rows; both logits (..., K).

    The factor keeps the gradient's size as T grows.
    """
    log_student = functional.log_softmax(student / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher / temperature, dim=-1)
    rows = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return temperature**2 * rows.mean()


def matrix_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `softened_kl` of two logit matrices (B, K), averaged over reading them by rows and by columns."""
    return (softened_kl(student, teacher, temperature) + softened_kl(student.T, teacher.T, temperature)) / 2


def relational(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], scale: Tensor | float) -> Tensor:
    """Return the KL between both models' similarities of all images with all texts, by rows and by columns.

    student, teacher: (images, texts), each (B, C); the two models may have different C. Duplicates stay in: both see them.
    """
    return matrix_kl(scale * cosines(*student), scale * cosines(*teacher))


def structure(student: Tensor, teacher: Tensor, scale: Tensor | float) -> Tensor:
    """Return the KL between both models' similarities of each row with every other row of one modality; both (B, C).

    Needs no pairs (DIME-FM, section 3.2). A row's similarity to itself is always 1, says nothing, and is left out.
    """
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    own, goal = (_without(scale * cosines(vectors, vectors), itself) for vectors in (student, teacher))
    return softened_kl(own, goal)


def affinity(student: Tensor, teacher: Tensor, bank: Tensor, scale: Tensor | float, temperature: float = 1.0) -> Tensor:
    """Return how differently `student` and `teacher` (B, C) see a bank (K, C) of the teacher's vectors of the other modality.

    Row i of the bank need not belong to row i of the batch, so images and texts may come from unrelated collections.
    """
    return softened_kl(scale * cosines(student, bank), scale * cosines(teacher, bank), temperature)


def token_log_likelihoods(roots: Tensor, tokens: Tensor) -> Tensor:
    """Return (T,): log p of each of `tokens` (T,) int under `roots` (T, V)."""
    return 2 * _log(roots.gather(1, tokens[:, None]).squeeze(1))


def answer_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return (T,): KL(teacher || student) of the next token at each place; both roots (T, V)."""
    return 2 * (teacher.square() * (_log(teacher) - _log(student))).sum(-1)


def hidden(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over rows of the squared difference, relative to the variance of the teacher's row; both (B, C)."""
    spread = teacher.var(1, correction=0).clamp_min(torch.finfo(teacher.dtype).tiny)
    return ((student - teacher).square().mean(1) / spread).mean()


def _log(roots: Tensor) -> Tensor:
    """Return the logarithm, of 0 a finite one: p log p is 0 there, and p log 0 would be nan."""
    return roots.clamp_min(torch.finfo(roots.dtype).tiny).log()


def _without(logits: Tensor, excluded: Tensor | None) -> Tensor:
    return logits if excluded is None else logits.masked_fill(excluded, EXCLUDED)


def mutual(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean over rows of how far the softmaxes of `one` and `other`, both (B, C), are from their mean."""
    logs = torch.stack([one.float().log_softmax(dim=-1), other.float().log_softmax(dim=-1)])
    mean = logs.exp().mean(dim=0)
    return (mean * (mean.log() - logs)).sum(dim=-1).mean()
